"""Pictures and captions in one file, CSV, TSV or Parquet: the format of prepared data sets too."""

from __future__ import annotations

import csv
import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv as pa_csv
import pyarrow.parquet as pq

from twotower.data.pairs import DATASETS, PairTable
from twotower.data.places import file_of
from twotower.data.splits import SplitConfig, draw_splits
from twotower.data.table import one_caption_a_row
from twotower.settings import ConfigError, setting
from twotower.wandb_files import local_file

log = logging.getLogger(__name__)

DELIMITERS = {".csv": ",", ".tsv": "\t"}
ENDINGS = (".csv", ".tsv", ".csv.gz", ".tsv.gz", ".parquet")
FILES_LOOKED_FOR = 16
NOT_A_NUMBER = ("nan", "NaN")  # how pandas and numpy write a missing caption as text


@dataclass(kw_only=True)
class ManifestConfig(SplitConfig):
    """A CSV, TSV or Parquet file with a row for each caption of a picture, or lists of them."""

    manifest: str = setting(
        "",
        "the file: .csv, .tsv (either with .gz) or .parquet; or wandb:<entity>/<project>/"
        "<name>:<version>",
    )
    root: str = setting("", "folder that relative paths start from; by default the manifest's")
    filepath_column: str = setting("filepath", "column of picture files")
    caption_column: str = setting("caption", "column of captions; empty for pictures without any")
    split_column: str = setting(
        "split", "column of splits; without it a seeded choice by image; empty ignores it"
    )
    image_id_column: str = setting(
        "image_id", "column that says which rows are one image; without it the file path says so"
    )
    class_column: str = setting(
        "class", "column of what a picture shows, for zero-shot classification, if there is one"
    )


@DATASETS.register("manifest", ManifestConfig)
def load_manifest(config: ManifestConfig, *, bare: bool = False) -> PairTable:
    """The images of a manifest, in the order of their first row.

    Rows without a caption are left out and counted in the log.

    Args:
        bare: they are kept, as images without captions.

    Raises:
        ConfigError: the file or a column is missing, a line is malformed, or nothing is left.
    """
    if not config.manifest:
        raise ConfigError(
            "data.manifest is not given; set it to a .csv, .tsv or .parquet file with the columns "
            f"{config.filepath_column}, {config.caption_column} and, if there is one, "
            f"{config.split_column}"
        )
    path = local_file(config.manifest, ENDINGS)
    rows = _standard_columns(_read(path, config), path, config)
    name = path.name
    if not rows.num_rows:
        raise ConfigError(f"{path} has no rows")
    if config.caption_column:
        rows = _without_blanks(rows) if bare else _drop_rows_without_caption(rows, path)
    drawn = "split" not in rows.column_names
    if drawn:
        rows = rows.append_column("split", _repeat("", rows.num_rows))
    pairs = PairTable.from_rows(rows, Path(config.root) if config.root else path.parent, name)
    _check_files(pairs)
    return draw_splits(pairs, config.val_fraction, config.split_seed) if drawn else pairs


def write_manifest(path: Path, header: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """Write a CSV manifest; the caller cares for temporary names."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(header)
        writer.writerows(rows)


def _read(path: Path, config: ManifestConfig) -> pa.Table:
    if not path.is_file():
        raise ConfigError(f"there is no manifest at {path}; data.manifest must name a file")
    suffix = Path(path.name.lower().removesuffix(".gz")).suffix
    try:
        if suffix == ".parquet":
            return pq.read_table(path)
        if suffix not in DELIMITERS:
            raise ConfigError(f"{path} must end in .csv, .tsv (either with .gz) or .parquet")
        return _read_text(path, DELIMITERS[suffix], config)
    except pa.ArrowException as error:
        reason = str(error).removeprefix("CSV parse error: ").split("\n")[0]
        if "Empty CSV" in reason:
            reason = "it is empty; its first line must name the columns"
        raise ConfigError(f"{path} cannot be read: {reason[:200]}") from error
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror or error}") from error


def _read_text(path: Path, delimiter: str, config: ManifestConfig) -> pa.Table:
    columns = (
        config.filepath_column,
        config.caption_column,
        config.split_column,
        config.image_id_column,
        config.class_column,
    )

    def read(threads: bool) -> pa.Table:
        return pa_csv.read_csv(
            path,
            pa_csv.ReadOptions(use_threads=threads, block_size=1 << 24),
            pa_csv.ParseOptions(delimiter=delimiter, newlines_in_values=True),
            pa_csv.ConvertOptions(column_types=dict.fromkeys(columns, pa.large_string())),
        )

    try:
        return read(threads=True)
    except pa.ArrowInvalid:
        return read(threads=False)  # slower, and its message has the number of the row


def _standard_columns(table: pa.Table, path: Path, config: ManifestConfig) -> pa.Table:
    """Rename to filepath, caption, split, image_id and class, as text; keep what else there is."""
    caption_column = config.caption_column
    if caption_column == "caption" and not {"caption", "captions"}.isdisjoint(table.column_names):
        caption_column = "caption" if "caption" in table.column_names else "captions"
    table = one_caption_a_row(table, caption_column)
    wanted = {
        "filepath": config.filepath_column,
        "caption": caption_column,
        "split": config.split_column,
        "image_id": config.image_id_column,
        "class": config.class_column,
    }
    optional = ["split"] if config.split_column in ("", "split") else []
    optional += ["image_id"] if config.image_id_column in ("", "image_id") else []
    optional += ["class"] if config.class_column in ("", "class") else []
    optional += [] if config.caption_column else ["caption"]
    there = {}
    for name, column in wanted.items():
        if column and column in table.column_names:
            if table.column_names.count(column) > 1:
                raise ConfigError(f"{path} has the column {column} more than once")
            there[name] = _text(table[column], f"{path}: the column {column}")
        elif name not in optional:
            raise ConfigError(
                f"{path} has no column {column}; it has {', '.join(table.column_names)} "
                f"(data.{name}_column chooses another)"
            )
    for name in there.keys() - {"caption", "class"}:
        _refuse_gaps(there[name], f"{path}: the column {wanted[name]}")
    there.setdefault("caption", pa.nulls(table.num_rows, pa.large_string()))
    there.setdefault("image_id", there["filepath"])
    extra = [
        column
        for column in dict.fromkeys(table.column_names)
        if column not in {*wanted.values(), *wanted, "captions", ""}
        and table.column_names.count(column) == 1
    ]
    return pa.table({**there, **{column: table[column] for column in extra}})


def _text(column: pa.ChunkedArray, what: str) -> pa.ChunkedArray:
    """A column as trimmed text, null where it is blank."""
    try:
        text = pc.utf8_trim_whitespace(column.cast(pa.large_string()))
    except pa.ArrowException as error:
        raise ConfigError(f"{what} holds {column.type}, not text") from error
    return pc.if_else(pc.equal(text, ""), pa.scalar(None, pa.large_string()), text)


def _refuse_gaps(column: pa.ChunkedArray, what: str) -> None:
    if column.null_count:
        row = pc.index(column.is_null(), True).as_py()
        raise ConfigError(f"{what} is empty in {column.null_count} rows, first in row {row + 1}")


def _no_caption(rows: pa.Table) -> pa.ChunkedArray:
    """Which rows have none."""
    caption = rows["caption"]
    blank = pc.is_in(caption, pa.array(NOT_A_NUMBER, pa.large_string()))
    return pc.or_kleene(caption.is_null(), blank)


def _without_blanks(rows: pa.Table) -> pa.Table:
    text = pa.large_string()
    captions = pc.if_else(_no_caption(rows), pa.scalar(None, text), rows["caption"])
    return rows.set_column(rows.column_names.index("caption"), "caption", captions)


def _drop_rows_without_caption(rows: pa.Table, path: Path) -> pa.Table:
    missing = _no_caption(rows)
    count = pc.sum(missing).as_py()
    if not count:
        return rows
    if count == rows.num_rows:
        raise ConfigError(
            f"{path} has no captions in {count} rows; for pictures alone set data.caption_column="
        )
    kept = rows.filter(pc.invert(missing))
    lost = len(pc.unique(rows["image_id"])) - len(pc.unique(kept["image_id"]))
    log.warning("%s: left out %d rows without a caption, and so %d images", path, count, lost)
    return kept


def _repeat(text: str, count: int) -> pa.Array:
    return pa.repeat(pa.scalar(text, pa.large_string()), count)


def _check_files(pairs: PairTable) -> None:
    """Refuse a wrong root at once, instead of a million unreadable pictures later."""
    paths = [pairs.path(row) for row in islice(range(len(pairs)), FILES_LOOKED_FOR)]
    if not any(file_of(path).exists() for path in paths):
        raise ConfigError(
            f"{pairs.name}: there is no file {paths[0]}, nor any of the first {len(paths)}; "
            "data.root must be the folder that its paths start from"
        )
