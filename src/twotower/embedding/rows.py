"""Which rows a store has: the fixed grid of shards, and the metadata of its rows."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from twotower.data.pairs import PairTable
from twotower.embedding.layout import STATE_SCHEMA, IntArray
from twotower.embedding.pictures import FileState
from twotower.encode_config import Rows

_OWN = ("image_path", "caption", "captions", "row_id", "source_row", "image_id", "split")


class Slots(NamedTuple):
    """The rows of a shard if every picture can be read: source row, caption and id of each."""

    source_rows: IntArray
    captions: list[str]
    row_ids: IntArray


class RowGrid:
    """The rows of a source, cut by source row: shard s holds the images [s * S, (s + 1) * S).

    With `rows=images` a row is an image with its first caption and `row_id` is the source row. With
    `rows=pairs` a row is a caption and `row_id` counts the captions of the whole source. An image
    without captions has one row, with the empty caption. Ids are counted before anything is read:
    an unreadable picture leaves a gap, so that no id changes when it is mended.
    """

    def __init__(self, pairs: PairTable, rows: Rows) -> None:
        self.pairs = pairs
        self.rows = rows
        counts = _num_captions(pairs) if rows is Rows.pairs else np.ones(len(pairs), np.int64)
        self.counts: IntArray = np.maximum(counts, 1)
        self._first_id = np.concatenate([[0], np.cumsum(self.counts)]).astype(np.int64)

    def slots(self, source_rows: range) -> Slots:
        """The rows of a range of images."""
        first, stop = source_rows.start, source_rows.stop
        lists = self.pairs.table["captions"].slice(first, stop - first).to_pylist()
        filled = [captions or [""] for captions in lists]
        if self.rows is Rows.images:
            filled = [captions[:1] for captions in filled]
        counts = np.diff(self._first_id[first : stop + 1])
        return Slots(
            np.repeat(np.arange(first, stop, dtype=np.int64), counts),
            [caption for captions in filled for caption in captions],
            np.arange(self._first_id[first], self._first_id[stop], dtype=np.int64),
        )

    def metadata(
        self, slots: Slots, keep: npt.NDArray[np.bool_], *, extra: bool = True
    ) -> pa.Table:
        """The metadata of the slots that are kept.

        Columns: image_path (absolute), caption (of the row), captions (all of the image), row_id,
        source_row, image_id, split, then what else the source has; a source's column with one of
        these names gets `source_` before it. `extra=False` leaves those of the source out.
        """
        rows = slots.source_rows[keep]
        first, last = (int(rows[0]), int(rows[-1])) if len(rows) else (0, -1)
        source = self.pairs.table.slice(first, last + 1 - first).take(pa.array(rows - first))
        root = os.path.abspath(self.pairs.root)
        paths = [os.path.join(root, path) for path in source["filepath"].to_pylist()]
        captions = [slots.captions[place] for place in np.flatnonzero(keep)]
        columns = {
            "image_path": pa.array(paths, pa.string()),
            "caption": pa.array(captions, pa.string()),
            "captions": source["captions"],
            "row_id": pa.array(slots.row_ids[keep]),
            "source_row": pa.array(rows),
            "image_id": source["image_id"],
            "split": source["split"],
        }
        for name in source.column_names if extra else []:
            if name not in ("filepath", "captions", "image_id", "split"):
                columns[f"source_{name}" if name in _OWN else name] = source[name]
        return pa.table(columns).combine_chunks()

    def states(
        self, source_rows: range, files: Sequence[FileState], reasons: Mapping[int, str]
    ) -> pa.Table:
        """What the images of a range are now, by `STATE_SCHEMA`.

        Args:
            files: of each image, none where no picture is read; reasons: by source row, why an
                image cannot be read.
        """
        first, stop = source_rows.start, source_rows.stop
        sizes, times, hashes = zip(*(files or [FileState()] * len(source_rows)), strict=True)
        columns = [
            self.pairs.table["image_id"].slice(first, stop - first).combine_chunks(),
            self._first_id[first:stop],
            np.diff(self._first_id[first : stop + 1]),
            *(sizes, times, hashes),
            row_hashes(self.pairs, source_rows),
            [reasons.get(row, "") for row in source_rows],
        ]
        arrays = [
            pa.array(column, kind.type) for column, kind in zip(columns, STATE_SCHEMA, strict=True)
        ]
        return pa.table(arrays, schema=STATE_SCHEMA)

    @property
    def first_ids(self) -> IntArray:
        """By source row, the id of its first row."""
        return self._first_id[:-1]


def with_ids(metadata: pa.Table, row_ids: IntArray, source_rows: IntArray) -> pa.Table:
    """Metadata with other ids and source rows, its columns in their order."""
    for name, values in (("row_id", row_ids), ("source_row", source_rows)):
        place = metadata.schema.get_field_index(name)
        metadata = metadata.set_column(place, name, pa.array(values, pa.int64()))
    return metadata


def id_ranges(first: IntArray, counts: IntArray) -> IntArray:
    """The ids first[0], first[0] + 1, ... (counts[0] of them), first[1], ... in one array."""
    starts = np.cumsum(counts) - counts
    ids: IntArray = np.repeat(first - starts, counts) + np.arange(int(counts.sum()), dtype=np.int64)
    return ids


def row_hashes(pairs: PairTable, rows: range) -> list[str]:
    """A hash of all that the source says of each image: path, captions, columns."""
    part = pairs.table.slice(rows.start, len(rows))
    root = os.path.abspath(pairs.root)
    columns = [part[name].to_pylist() for name in part.column_names]
    names = repr((root, part.column_names))
    return [
        hashlib.blake2b(f"{names}{values!r}".encode(errors="replace"), digest_size=16).hexdigest()
        for values in zip(*columns, strict=True)
    ]


def _num_captions(pairs: PairTable) -> IntArray:
    lengths = pc.fill_null(pc.list_value_length(pairs.table["captions"]), 0)
    counts: IntArray = lengths.to_numpy().astype(np.int64)
    return counts


def has_captions(pairs: PairTable) -> bool:
    """Whether any image has a caption."""
    return bool(_num_captions(pairs).any())


class _Hashing:
    """A file to write to that keeps nothing but the hash."""

    closed = False

    def __init__(self) -> None:
        self.sha256 = hashlib.sha256()

    def write(self, data: bytes) -> int:
        self.sha256.update(data)
        return len(data)

    def flush(self) -> None:
        pass


def fingerprint(pairs: PairTable) -> str:
    """SHA-256 of what a source says: its root, and every path, caption and column in order.

    The contents of the pictures are not read: a file that changes under the same name is not
    noticed.
    """
    sink = _Hashing()
    sink.write(os.path.abspath(pairs.root).encode(errors="surrogateescape"))
    table = pairs.table.replace_schema_metadata(None).combine_chunks()
    with pa.ipc.new_stream(pa.PythonFile(sink, mode="w"), table.schema) as stream:
        stream.write_table(table, max_chunksize=65536)
    return sink.sha256.hexdigest()
