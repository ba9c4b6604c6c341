"""What has changed in a source since it was encoded: by size and time, then by content."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from twotower.console import progress
from twotower.data.pairs import PairTable
from twotower.embedding.layout import STATE_SCHEMA, IntArray
from twotower.embedding.pictures import FileState, row_state, stat_row
from twotower.embedding.rows import RowGrid, row_hashes
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
        kept: by row of the source, its state if it is as it was, else None.
        deleted: ids of rows whose image has vanished, or whose captions are another number.
        new, changed, vanished: how many images.
    """

    rows: IntArray
    first_ids: IntArray
    counts: IntArray
    kept: list[dict[str, object] | None]
    deleted: list[int]
    next_row_id: int
    new: int
    changed: int
    vanished: int

    def states(self, encoded: pa.Table) -> pa.Table:
        """The states of the whole source, in its order, with those of the encoded rows put in."""
        fresh = dict(zip(self.rows.tolist(), encoded.to_pylist(), strict=True))
        whole = []
        for row, kept in enumerate(self.kept):
            state = kept if kept is not None else fresh[row]
            whole.append({**state, "row_id": int(self.first_ids[row])})
        return pa.Table.from_pylist(whole, STATE_SCHEMA)


def find_changes(
    pairs: PairTable, rows: Rows, states: pa.Table, next_row_id: int, *, files: bool
) -> Changes:
    """Compare a source with the states of its images when they were encoded.

    Args:
        files: whether the pictures' files count; else only captions and columns do.
    """
    before = {state["image_id"]: state for state in states.to_pylist()}
    counts = RowGrid(pairs, rows).counts
    images: Sequence[str] = pairs.table["image_id"].to_pylist()
    first_ids = np.zeros(len(pairs), np.int64)
    kept: list[dict[str, object] | None] = []
    deleted: list[int] = []
    new = changed = 0
    with (
        ThreadPoolExecutor(LOOKS_AT_A_TIME) as pool,
        progress("looking for changes", len(pairs), "images") as line,
    ):
        for first in range(0, len(pairs), BLOCK):
            block = range(first, min(first + BLOCK, len(pairs)))
            hashes = dict(zip(block, row_hashes(pairs, block), strict=True))
            there = [row for row in block if images[row] in before]
            old = [before[images[row]] for row in there]
            same = [hashes[row] == state["about"] for row, state in zip(there, old, strict=True)]
            if files:
                looks = pool.map(_is_same_file, [pairs] * len(there), there, old)
                same = [mark and look for mark, look in zip(same, looks, strict=True)]
            marks = dict(zip(there, same, strict=True))
            for row in block:
                state = before.pop(images[row], None)
                count = int(counts[row])
                if state is not None and state["rows"] == count:
                    first_ids[row] = state["row_id"]
                else:
                    first_ids[row] = next_row_id
                    next_row_id += count
                    deleted += _ids(state)
                new += state is None
                changed += state is not None and not marks[row]
                kept.append(state if marks.get(row) else None)
            line.advance(len(block))
    vanished = list(before.values())
    for state in vanished:
        deleted += _ids(state)
    return Changes(
        np.array([row for row, state in enumerate(kept) if state is None], np.int64),
        first_ids,
        counts,
        kept,
        deleted,
        next_row_id,
        new,
        changed,
        len(vanished),
    )


def _ids(state: dict[str, object] | None) -> list[int]:
    """The ids of an image's rows; none if it could not be read."""
    if state is None or state["reason"]:
        return []
    first, count = state["row_id"], state["rows"]
    assert isinstance(first, int) and isinstance(count, int)
    return list(range(first, first + count))


def _is_same_file(pairs: PairTable, row: int, state: dict[str, object]) -> bool:
    """Whether a picture's file holds what it held; its new time goes into the state."""
    now = stat_row(pairs, row)
    if now.size != state["size"]:
        return False
    if now.mtime_ns == state["mtime_ns"]:
        return True
    now = row_state(pairs, row)
    if now == FileState() or now.sha256 != state["sha256"]:
        return False
    state["mtime_ns"] = now.mtime_ns
    return True
