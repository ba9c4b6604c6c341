"""Captions that say nothing, and captions that the text tower reads only in part."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv as pa_csv
import pyarrow.parquet as pq

from twotower.config import DataConfig
from twotower.data.manifest import DELIMITERS, ENDINGS, NOT_A_NUMBER, ManifestConfig
from twotower.data.pairs import PairTable
from twotower.wandb_files import local_file

BATCH = 1024


class CaptionFacts(NamedTuple):
    """What there is to say about the captions.

    Attributes:
        captions: how many there are. blank_rows: rows of the manifest that have none, which loading
            leaves out. too_long: how many lose their end. length: tokens that are read.
        longest: characters. without: rows (M,) of images that have no caption.
        cut: for each image how many of its captions lose their end: (N,).
    """

    captions: int
    blank_rows: int
    too_long: int
    length: int
    longest: int
    without: npt.NDArray[np.int64]
    cut: npt.NDArray[np.int64]


def examine_captions(pairs: PairTable, config: DataConfig | None, tokenizer: Any) -> CaptionFacts:
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
        blank_rows=blank_rows(config) if isinstance(config, ManifestConfig) else 0,
        too_long=int(cut.sum()),
        length=tokenizer.context_length,
        longest=max(map(len, texts), default=0),
        without=np.flatnonzero(sizes == 0),
        cut=cut,
    )


def blank_rows(config: ManifestConfig) -> int:
    """Rows of a manifest without a caption."""
    path = local_file(config.manifest, ENDINGS)
    # As loading does, take lists of captions where there is no column of single ones.
    names = [config.caption_column, *(["captions"] if config.caption_column == "caption" else [])]
    columns = (_column(path, name) for name in names if name)
    column = next((column for column in columns if column is not None), None)
    if column is None:
        return 0
    if pa.types.is_list(column.type) or pa.types.is_large_list(column.type):
        blank = pc.equal(pc.list_value_length(column).fill_null(0), 0)
    else:
        text = pc.utf8_trim_whitespace(column.cast(pa.large_string())).fill_null("")
        blank = pc.is_in(text, pa.array(["", *NOT_A_NUMBER], pa.large_string()))
    return int(pc.sum(blank).as_py() or 0)


def _column(path: Path, name: str) -> pa.ChunkedArray | None:
    """One column of a manifest; None if it has no such column."""
    suffix = Path(path.name.lower().removesuffix(".gz")).suffix
    if suffix == ".parquet":
        has = name in pq.read_schema(path).names
        return pq.read_table(path, columns=[name])[name] if has else None
    parse = pa_csv.ParseOptions(delimiter=DELIMITERS[suffix], newlines_in_values=True)
    read = pa_csv.ReadOptions(use_threads=False, block_size=1 << 24)
    convert = pa_csv.ConvertOptions(column_types={name: pa.large_string()}, include_columns=[name])
    if name not in pa_csv.open_csv(path, read, parse).schema.names:
        return None
    return pa_csv.read_csv(path, read, parse, convert)[name]
