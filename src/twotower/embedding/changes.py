"""What has changed in a source since it was encoded: by size and time, then by content."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from twotower.console import progress
from twotower.data.pairs import PairTable
from twotower.embedding.alive import Mask
from twotower.embedding.layout import STATE_SCHEMA, IntArray
from twotower.embedding.pictures import FileState, row_state, stat_row
from twotower.embedding.rows import RowGrid, id_ranges, row_hashes
from twotower.encode_config import Rows

LOOKS_AT_A_TIME = 8  # threads, since a look at a file on a network is mostly waiting
BLOCK = 4096


@dataclass(frozen=True)
class Changes:
    """A source compared with what a store holds of it.

    Attributes:
        rows: rows of the source that are to be encoded, ascending: new or changed.
        first_ids: by row of the source, the id of its first row in the store.
        counts: by row of the source, how many rows it has there if it can be read.
        kept: the states of the other rows of the source, in its order.
        deleted: ids of rows whose image has vanished, or whose captions are another number.
        next_row_id: the first id that no row has had.
        new, changed, vanished: how many images.
    """

    rows: IntArray
    first_ids: IntArray
    counts: IntArray
    kept: pa.Table
    deleted: IntArray
    next_row_id: int
    new: int
    changed: int
    vanished: int

    def words(self) -> str:
        """What was found."""
        return f"{self.new:,} new, {self.changed:,} changed and {self.vanished:,} vanished"

    def states(self, encoded: pa.Table) -> pa.Table:
        """The states of the whole source, in its order, with those of the encoded rows put in."""
        is_kept = np.ones(len(self.first_ids), bool)
        is_kept[self.rows] = False
        place = np.cumsum(is_kept) - 1
        place[self.rows] = len(self.kept) + np.arange(len(self.rows))
        whole = pa.concat_tables([self.kept, encoded]).take(pa.array(place))
        return _with_column(whole, "row_id", self.first_ids)


def find_changes(
    pairs: PairTable, rows: Rows, states: pa.Table, next_row_id: int, *, files: bool
) -> Changes:
    """Compare a source with the states of its images when they were encoded.

    Args:
        files: whether the pictures' files count; else only captions and columns do.
    """
    counts = RowGrid(pairs, rows).counts
    before = _matched(pairs.table["image_id"], states["image_id"])
    known = before >= 0
    same, times = _compare(pairs, states, before, files=files)
    kept = states.take(pa.array(before[same]))

    state_ids, state_counts = (states[name].to_numpy() for name in ("row_id", "rows"))
    stays = known.copy()  # the ids of an image whose rows are as many as they were
    stays[known] = state_counts[before[known]] == counts[known]
    first_ids = next_row_id + np.cumsum(counts * ~stays) - counts
    first_ids[stays] = state_ids[before[stays]]

    vanished = np.ones(len(states), bool)
    vanished[before[known]] = False
    gone = np.concatenate([before[known & ~stays], np.flatnonzero(vanished)])
    # What could not be read has no rows.
    gone = gone[pc.equal(states["reason"], "").to_numpy()[gone]]
    return Changes(
        rows=np.flatnonzero(~same),
        first_ids=first_ids,
        counts=counts,
        kept=_with_column(kept, "mtime_ns", times[same]),
        deleted=id_ranges(state_ids[gone], state_counts[gone]),
        next_row_id=next_row_id + int(counts[~stays].sum()),
        new=int(np.count_nonzero(~known)),
        changed=int(np.count_nonzero(known & ~same)),
        vanished=int(np.count_nonzero(vanished)),
    )


def _with_column(states: pa.Table, name: str, values: IntArray) -> pa.Table:
    place = STATE_SCHEMA.get_field_index(name)
    return states.set_column(place, STATE_SCHEMA.field(name), pa.array(values, pa.int64()))


def _matched(now: pa.ChunkedArray, before: pa.ChunkedArray) -> IntArray:
    """For each image its row in the states, or -1.

    A source may have two images of one id (tars of one name in two folders): the first is matched
    with the first, the second with the second.
    """
    both = pa.chunked_array([*before.chunks, *now.chunks], before.type).combine_chunks()
    both = pa.concat_arrays(both.chunks) if isinstance(both, pa.ChunkedArray) else both
    codes = both.dictionary_encode().indices.to_numpy().astype(np.int64)
    there, here = (_numbered(part) for part in (codes[: len(before)], codes[len(before) :]))
    _, there_places, here_places = np.intersect1d(
        there, here, assume_unique=True, return_indices=True
    )
    places: IntArray = np.full(len(now), -1, np.int64)
    places[here_places] = there_places
    return places


def _numbered(codes: IntArray) -> IntArray:
    """A number for each that is its code's and, of equal codes, tells the first from the second."""
    order = np.argsort(codes, kind="stable")
    ordered = codes[order]
    first = np.searchsorted(ordered, ordered)
    times: IntArray = np.empty(len(codes), np.int64)
    times[order] = np.arange(len(codes)) - first
    return codes + (times << 32)


def _compare(
    pairs: PairTable, states: pa.Table, before: IntArray, *, files: bool
) -> tuple[Mask, IntArray]:
    """Which images are what they were, and the times of their files now."""
    same: Mask = np.zeros(len(pairs), bool)
    times: IntArray = np.zeros(len(pairs), np.int64)
    with (
        ThreadPoolExecutor(LOOKS_AT_A_TIME) as pool,
        progress("looking for changes", len(pairs), "images") as line,
    ):
        for first in range(0, len(pairs), BLOCK):
            block = range(first, min(first + BLOCK, len(pairs)))
            there = np.flatnonzero(before[first : block.stop] >= 0)
            old = states.take(pa.array(before[first + there])).to_pylist()
            hashes = row_hashes(pairs, block)
            rows = [int(row) for row in first + there]
            looks = (
                pool.map(_time_if_same, [pairs] * len(rows), rows, old)
                if files
                else (state["mtime_ns"] for state in old)
            )
            for row, state, time in zip(rows, old, looks, strict=True):
                same[row] = time is not None and hashes[row - first] == state["about"]
                times[row] = time or 0
            line.advance(len(block))
    return same, times


def _time_if_same(pairs: PairTable, row: int, state: dict[str, object]) -> int | None:
    """The time of a picture's file if it holds what it held, else None."""
    now = stat_row(pairs, row)
    if now.size != state["size"]:
        return None
    if now.mtime_ns == state["mtime_ns"]:
        return now.mtime_ns
    now = row_state(pairs, row)
    return None if now == FileState() or now.sha256 != state["sha256"] else now.mtime_ns
