"""A table of images with their captions: what every data source yields."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import torch
from torch import Tensor

from twotower.settings import ConfigError

log = logging.getLogger(__name__)

# Large strings, since an ordinary Arrow string column ends at 2 GiB: 15 million captions.
SCHEMA = pa.schema(
    [
        ("filepath", pa.large_string()),
        ("captions", pa.list_(pa.large_string())),
        ("split", pa.large_string()),
        ("image_id", pa.large_string()),
    ]
)


class Pair(NamedTuple):
    """One row of a manifest: a picture, one of its captions or None, its split, its identity."""

    filepath: str
    caption: str | None
    split: str
    image_id: str


@dataclass(frozen=True)
class PairTable:
    """Images in the source's order, a row an image with all its captions: what a source yields.

    Attributes:
        table: columns of `SCHEMA`, then any that the source has (url, class, ...); Arrow, so that
            millions of rows cost tens of bytes each.
        root: folder that relative file paths start from.
        name: what to call the source in messages.
    """

    table: pa.Table
    root: Path
    name: str = "data"

    @classmethod
    def from_rows(cls, rows: pa.Table, root: Path, name: str) -> PairTable:
        """Group rows by image, in order of first appearance.

        `rows` has the text columns filepath, caption, split and image_id, one row a caption; a null
        caption counts for nothing. Of any other column an image keeps its first value.

        Raises:
            ConfigError: one image appears in two splits, which would leak it, or there is no row.
        """
        if not rows.num_rows:
            raise ConfigError(f"{name} has no images")
        codes, count = _codes(rows["image_id"])
        order = np.argsort(codes, kind="stable")
        first = order[np.searchsorted(codes[order], np.arange(count))]  # (images,)
        splits, _ = _codes(rows["split"])
        leaks = np.flatnonzero(splits != splits[first][codes])
        if len(leaks):
            row = int(leaks[0])
            image, split = (str(rows[column][row]) for column in ("image_id", "split"))
            other = rows["split"][int(first[codes[row]])]
            raise ConfigError(
                f"{name}: image {image} is in the splits {other} and {split}; "
                "an image belongs to one split"
            )
        captions = _column(rows["caption"]).take(pa.array(order))
        has_caption = np.asarray(captions.is_valid())
        sizes = np.bincount(codes[order][has_caption], minlength=count)
        lists = pa.ListArray.from_arrays(
            pa.array(np.concatenate([[0], np.cumsum(sizes)]), pa.int32()), captions.drop_null()
        )
        images = rows.drop_columns(["caption"]).take(pa.array(first))
        columns = {"captions": lists, **{c: images[c] for c in images.column_names}}
        extra = [column for column in columns if column not in SCHEMA.names]
        arrays = [columns[kind.name].cast(kind.type) for kind in SCHEMA]
        table = pa.table([*arrays, *(columns[c] for c in extra)], names=[*SCHEMA.names, *extra])
        return cls(table.combine_chunks(), root, name)

    @classmethod
    def from_pairs(cls, pairs: Iterable[Pair], root: Path, name: str) -> PairTable:
        """Group pairs by image, in order of first appearance.

        Raises:
            ConfigError: as `from_rows`.
        """
        columns = list(zip(*pairs, strict=True)) or [()] * len(Pair._fields)
        arrays = [pa.array(column, pa.large_string()) for column in columns]
        return cls.from_rows(pa.table(arrays, names=list(Pair._fields)), root, name)

    def rows(self) -> pa.Table:
        """A row a caption, or one without, as a manifest has them: what `from_rows` groups."""
        lists = _column(self.table["captions"])
        lengths = pc.list_value_length(lists).to_numpy(zero_copy_only=False)
        image = np.repeat(np.arange(len(self)), np.maximum(lengths, 1))
        there = lengths[image] > 0
        place = pa.array(np.cumsum(there) - 1, mask=~there)
        captions = pc.list_flatten(lists).take(place)
        rows = self.table.drop_columns(["captions"]).take(pa.array(image))
        return rows.add_column(1, "caption", captions)

    def __len__(self) -> int:
        return int(self.table.num_rows)

    def split(self, split: str) -> PairTable:
        """The images of one split; an empty name is all of them.

        Raises:
            ConfigError: the split has no images.
        """
        if not split:
            return self
        rows = self.table.filter(pc.equal(self.table["split"], split))
        if not rows.num_rows:
            have = ", ".join(sorted(pc.unique(self.table["split"]).to_pylist()))
            raise ConfigError(f"{self.name} has no split {split!r}; it has {have}")
        return PairTable(rows.combine_chunks(), self.root, self.name)

    def head(self, count: int) -> PairTable:
        """The first `count` images; 0 is all of them."""
        return PairTable(self.table.slice(0, count), self.root, self.name) if count else self

    def take(self, rows: npt.NDArray[np.int64]) -> PairTable:
        """The images of some rows, in their order."""
        return PairTable(self.table.take(pa.array(rows)), self.root, self.name)

    def path(self, row: int) -> Path:
        """Where the picture of a row lies: a file, or a piece of one (`places.read_bytes`)."""
        return self.root / str(self.table["filepath"][row].as_py())

    def captions(self, row: int) -> list[str]:
        """The captions of a row, in the source's order."""
        captions: list[str] = self.table["captions"][row].as_py()
        return captions

    def all_captions(self) -> tuple[list[str], Tensor]:
        """Every caption, and the row of its image: (C,) int64."""
        lists = self.table["captions"].combine_chunks()
        rows = pc.list_parent_indices(lists).to_numpy(zero_copy_only=False)
        captions: list[str] = pc.list_flatten(lists).to_pylist()
        return captions, torch.from_numpy(rows.astype("int64"))

    def classes(self) -> list[str | None] | None:
        """What each picture shows, from the column `class`; None without it, or where it is blank.

        Class folders have the column, and a manifest may.
        """
        if "class" not in self.table.column_names:
            return None
        text = pc.utf8_trim_whitespace(self.table["class"].cast(pa.large_string()))
        return [label or None for label in text.to_pylist()]

    def has_captions(self) -> bool:
        """Whether any image has a caption."""
        return bool(pc.any(pc.greater(pc.list_value_length(self.table["captions"]), 0)).as_py())

    def with_captions(self) -> PairTable:
        """The images that have a caption: what training and measuring need.

        Raises:
            ConfigError: none has.
        """
        has_caption = pc.greater(pc.list_value_length(self.table["captions"]), 0)
        if pc.all(has_caption).as_py():
            return self
        rows = self.table.filter(has_caption)
        if not rows.num_rows:
            raise ConfigError(f"{self.name} has pictures but no captions")
        log.warning("%s: left out %d images without captions", self.name, len(self) - len(rows))
        return PairTable(rows.combine_chunks(), self.root, self.name)


def one_caption_a_row(table: pa.Table, column: str) -> pa.Table:
    """A row for each caption where `column` has lists of them; an empty list is one null."""
    if table.column_names.count(column) != 1:
        return table
    lists = table[column]
    kinds = (pa.types.is_list, pa.types.is_large_list, pa.types.is_fixed_size_list)
    if not any(is_kind(lists.type) for is_kind in kinds):
        return table
    lengths = pc.fill_null(pc.list_value_length(lists), 0).to_numpy()
    row = np.repeat(np.arange(len(lists)), np.maximum(lengths, 1))
    there = lengths[row] > 0
    place = pa.array(np.cumsum(there) - 1, mask=~there)
    captions = pc.list_flatten(lists).take(place)
    return table.drop_columns([column]).take(pa.array(row)).append_column(column, captions)


def concat_as_text(tables: Sequence[pa.Table]) -> pa.Table:
    """The rows of all tables, nulls where a column lacks; one of several types becomes text."""
    fields: dict[str, dict[pa.DataType, pa.Field]] = {}
    for field in (field for table in tables for field in table.schema):
        fields.setdefault(field.name, {})[field.type] = field
    mixed = [name for name, kinds in fields.items() if not _agree(kinds.values())]
    return pa.concat_tables(
        [_with_texts(table, mixed) for table in tables], promote_options="permissive"
    )


def _agree(fields: Iterable[pa.Field]) -> bool:
    try:
        pa.unify_schemas([pa.schema([f]) for f in fields], promote_options="permissive")
    except pa.ArrowException:
        return False
    return True


def _with_texts(table: pa.Table, names: Sequence[str]) -> pa.Table:
    for name in (name for name in names if name in table.column_names):
        values = table[name].to_pylist()
        texts = [
            v if v is None or isinstance(v, str) else json.dumps(v, default=str) for v in values
        ]
        place = table.schema.get_field_index(name)
        table = table.set_column(place, name, pa.array(texts, pa.large_string()))
    return table


def _column(column: pa.ChunkedArray | pa.Array) -> pa.Array:
    whole = column.combine_chunks()
    return pa.concat_arrays(whole.chunks) if isinstance(whole, pa.ChunkedArray) else whole


def _codes(column: pa.ChunkedArray) -> tuple[npt.NDArray[np.int64], int]:
    """Each row's value as a number, in order of first appearance, and how many values there are."""
    encoded = _column(column).dictionary_encode()
    return encoded.indices.to_numpy().astype(np.int64), len(encoded.dictionary)
