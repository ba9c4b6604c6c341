"""Captions that say nothing, and captions that the text tower reads only in part."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv as pa_csv
import pyarrow.parquet as pq

from twotower.config import DataConfig
from twotower.data.folder import FolderConfig, list_pictures, split_folders
from twotower.data.manifest import DELIMITERS, ENDINGS, NOT_A_NUMBER, ManifestConfig
from twotower.data.pairs import PairTable
from twotower.wandb_files import local_file

BATCH = 1024


class LeftOut(NamedTuple):
    """What a source does not read for want of a caption: how many, and what the first of it are."""

    number: int = 0
    first: tuple[str, ...] = ()


class CaptionFacts(NamedTuple):
    """What there is to say about the captions.

    Attributes:
        captions: how many there are. left_out: what loading left out, since it has none.
        too_long: how many lose their end. length: tokens that are read.
        longest: characters. without: rows (M,) of images that have no caption.
        cut: for each image how many of its captions lose their end: (N,).
    """

    captions: int
    left_out: LeftOut
    too_long: int
    length: int
    longest: int
    without: npt.NDArray[np.int64]
    cut: npt.NDArray[np.int64]


def examine_captions(pairs: PairTable, tokenizer: Any, left_out: LeftOut) -> CaptionFacts:
    """Count the captions of a source, those without words and those that are cut.

    Args:
        tokenizer: texts -> ids (N, context_length), a dataclass with `context_length` and `pad_id`.
    """
    lists = pairs.table["captions"]
    sizes = pc.list_value_length(lists).to_numpy().astype(np.int64)
    cut = np.zeros(len(pairs), np.int64)
    longer = dataclasses.replace(tokenizer, context_length=tokenizer.context_length + 1)
    texts, owners = pairs.all_captions()
    for first in range(0, len(texts), BATCH):
        # One that fills a place more than the tokenizer has would lose its end.
        full = longer(texts[first : first + BATCH])[:, -1] != tokenizer.pad_id
        np.add.at(cut, owners[first : first + BATCH][full].numpy(), 1)
    return CaptionFacts(
        captions=len(texts),
        left_out=left_out,
        too_long=int(cut.sum()),
        length=tokenizer.context_length,
        longest=max(map(len, texts), default=0),
        without=np.flatnonzero(sizes == 0),
        cut=cut,
    )


def find_left_out(config: DataConfig, pairs: PairTable, most: int) -> LeftOut:
    """Rows of a manifest, or pictures of a folder with .txt files, that have no caption.

    Args:
        pairs: what the source gave. most: how many are described.
    """
    if isinstance(config, ManifestConfig):
        return blank_rows(config, most)
    if isinstance(config, FolderConfig):
        files = list_pictures(Path(config.folder))
        splits = split_folders(files)
        read = set(pairs.table["filepath"].to_pylist())
        inside = [file for file in files if not splits or file.parts[0] in splits]
        without = [file for file in map(str, inside) if file not in read]
        return LeftOut(len(without), tuple(without[:most]))
    return LeftOut()


def blank_rows(config: ManifestConfig, most: int) -> LeftOut:
    """Rows of a manifest without a caption."""
    # As loading does, take lists of captions where there is no column of single ones.
    names = [config.caption_column, *(["captions"] if config.caption_column == "caption" else [])]
    table = _columns(local_file(config.manifest, ENDINGS), [*names, config.filepath_column])
    name = next((name for name in names if name in table.column_names), None)
    if name is None:
        return LeftOut()
    column = table[name]
    if pa.types.is_list(column.type) or pa.types.is_large_list(column.type):
        blank = pc.equal(pc.list_value_length(column).fill_null(0), 0)
    else:
        text = pc.utf8_trim_whitespace(column.cast(pa.large_string())).fill_null("")
        blank = pc.is_in(text, pa.array(["", *NOT_A_NUMBER], pa.large_string()))
    rows = np.flatnonzero(blank)
    files = table[config.filepath_column].take(pa.array(rows[:most])).to_pylist()
    named = zip(rows[:most].tolist(), files, strict=True)
    return LeftOut(len(rows), tuple(f"row {row + 1}: {file}" for row, file in named))


def _columns(path: Path, names: Sequence[str]) -> pa.Table:
    """Those of some columns that a manifest has."""
    suffix = Path(path.name.lower().removesuffix(".gz")).suffix
    if suffix == ".parquet":
        there = pq.read_schema(path).names
        return pq.read_table(path, columns=[name for name in names if name in there])
    parse = pa_csv.ParseOptions(delimiter=DELIMITERS[suffix], newlines_in_values=True)
    read = pa_csv.ReadOptions(use_threads=False, block_size=1 << 24)
    there = pa_csv.open_csv(path, read, parse).schema.names
    wanted = [name for name in names if name in there]
    types = dict.fromkeys(wanted, pa.large_string())
    convert = pa_csv.ConvertOptions(column_types=types, include_columns=wanted)
    return pa_csv.read_csv(path, read, parse, convert)
