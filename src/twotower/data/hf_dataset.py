"""Data sets of Hugging Face's `datasets` on disk, read in place: their Arrow files hold pictures.

The layout that `save_to_disk` writes is plain Arrow and JSON, so the library itself is not needed.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from twotower.data.folder import SPLIT_FOLDERS
from twotower.data.karpathy import read_json
from twotower.data.pairs import DATASETS, PairTable
from twotower.data.places import piece_name
from twotower.data.splits import SplitConfig, with_val
from twotower.data.table import SCHEMA, concat_as_text, one_caption_a_row
from twotower.data.templates import templated, text_or_templates, words_of
from twotower.settings import ConfigError, setting

log = logging.getLogger(__name__)

TEXT = pa.large_string()


@dataclass(kw_only=True)
class HFDatasetConfig(SplitConfig):
    """A data set that `datasets` wrote with save_to_disk, whole or with its splits."""

    folder: str = setting("", "folder that save_to_disk wrote")
    image_column: str = setting("image", "column of pictures: bytes or paths")
    caption_column: str = setting(
        "caption", "column of captions, one or a list; without it the class makes them"
    )
    class_column: str = setting("label", "column of what a picture shows, if there is one")
    image_id_column: str = setting(
        "", "column that says which rows are one image; empty: each row is"
    )
    templates: str = setting(
        "a photo of a {}.",
        "captions of a class where there are no others: a text with {} in it, simple7, openai80, "
        "or a file, one a line",
    )


@DATASETS.register("hf_dataset", HFDatasetConfig)
def load_hf_dataset(config: HFDatasetConfig) -> PairTable:
    """The pictures of every split in the order of the files; other columns are kept.

    Raises:
        ConfigError: the folder is no such data set, or a column is missing or of another kind.
    """
    if not config.folder:
        raise ConfigError("data.folder is not given; set it to a folder that save_to_disk wrote")
    root = Path(config.folder)
    parts = {"": root}
    if (root / "dataset_dict.json").is_file():
        parts = {name: root / name for name in _names(root / "dataset_dict.json", "splits")}
    elif not (root / "state.json").is_file():
        raise ConfigError(
            f"{root} is no data set on disk: it has neither dataset_dict.json nor state.json, as "
            "save_to_disk of the library datasets writes them"
        )
    tables = [
        one_caption_a_row(
            _rows(table, path.relative_to(root), number, split, config, features), "caption"
        )
        for split, folder in parts.items()
        for features in [_features(folder)]
        for number, (path, table) in enumerate(_arrow_files(folder, config.image_column))
    ]
    if not tables:
        raise ConfigError(f"{root} has no rows")
    rows = concat_as_text(tables)
    captions = pc.utf8_trim_whitespace(rows["caption"])
    captions = pc.if_else(pc.equal(captions, ""), pa.scalar(None, TEXT), captions)
    rows = rows.drop_columns(["caption"]).append_column("caption", captions)
    pairs = PairTable.from_rows(rows, root, str(root))
    return with_val(pairs, config)


def _features(folder: Path) -> dict[str, Any]:
    """What `dataset_info.json` says of each column."""
    path = folder / "dataset_info.json"
    features = _read_object(path).get("features") if path.is_file() else None
    return features if isinstance(features, dict) else {}


def _read_object(path: Path) -> dict[str, Any]:
    found = read_json(path)
    if not isinstance(found, dict):
        raise ConfigError(f"{path} is not what save_to_disk writes; write the data set anew")
    return found


def _names(path: Path, key: str) -> list[str]:
    """The files or folders that a description lists, which all lie beside it."""
    names: list[str] = []
    for entry in _read_object(path).get(key) or []:
        name = entry.get("filename") if isinstance(entry, dict) else entry
        if not isinstance(name, str) or Path(name).name != name:
            raise ConfigError(f"{path}: {key} has {name!r}, which is no name beside it")
        names.append(name)
    return names


def _arrow_files(folder: Path, image_column: str) -> Iterator[tuple[Path, pa.Table]]:
    """Each Arrow file and its table, in which `_place` has the pieces that the pictures are."""
    state = folder / "state.json"
    if _names(state, "_indices_data_files"):
        raise ConfigError(f"{folder} is a selection of rows; write it anew with save_to_disk")
    for name in _names(state, "_data_files"):
        path = folder / name
        try:
            whole = pa.memory_map(str(path)).read_buffer()
            table = pa.ipc.open_stream(whole).read_all()
        except (OSError, pa.ArrowException) as error:
            raise ConfigError(f"{path} is not a whole Arrow file ({error})") from error
        if image_column not in table.column_names:
            raise ConfigError(
                f"{path} has no column {image_column}; it has {', '.join(table.column_names)} "
                "(data.image_column chooses another)"
            )
        if table.num_rows:
            yield path, table.append_column("_place", _places(table[image_column], whole, path))


def _places(column: pa.ChunkedArray, whole: pa.Buffer, path: Path) -> pa.ChunkedArray:
    """The name of each picture relative to its file's folder: a piece of the file, or a path."""
    names: list[str | None] = []
    for chunk in column.chunks:
        data, paths = chunk, None
        if pa.types.is_struct(chunk.type):
            fields = [chunk.type.field(i).name for i in range(chunk.type.num_fields)]
            if "bytes" in fields:
                data, *rest = (chunk.field(name) for name in ("bytes", "path") if name in fields)
                paths = rest[0] if rest else None
        if pa.types.is_string(data.type) or pa.types.is_large_string(data.type):
            names += data.to_pylist()
            continue
        if not (pa.types.is_binary(data.type) or pa.types.is_large_binary(data.type)):
            raise ConfigError(
                f"{path}: the column of pictures holds {chunk.type}; it takes encoded pictures or "
                "paths (data.image_column chooses another)"
            )
        texts = [None] * len(data) if paths is None else paths.to_pylist()
        starts, sizes = _extents(data, whole, path)
        there = data.is_valid().to_pylist()
        for row, name in enumerate(texts):
            if there[row]:
                name = piece_name(path.name, int(starts[row]), int(sizes[row]), name or f"{row}")
            names.append(name)
    return pa.chunked_array([pa.array(names, TEXT)])


def _extents(
    data: pa.Array, whole: pa.Buffer, path: Path
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Where in its file each value starts, and its size: (n,) each."""
    _, offsets, values = data.buffers()
    kind = np.int64 if pa.types.is_large_binary(data.type) else np.int32
    bounds = np.frombuffer(offsets, kind)[data.offset : data.offset + len(data) + 1].astype("i8")
    start = values.address - whole.address if values is not None else 0
    if start < 0 or start + int(bounds[-1]) > whole.size:
        raise ConfigError(f"{path} is compressed; write it anew with save_to_disk")
    return start + bounds[:-1], np.diff(bounds)


def _rows(
    table: pa.Table,
    file: Path,
    number: int,
    split: str,
    config: HFDatasetConfig,
    features: dict[str, Any],
) -> pa.Table:
    """A file's table with the standard columns: a row a picture, with a caption or a list."""
    missing = table["_place"].null_count
    if missing:
        log.warning("%s: left out %d rows without a picture", file, missing)
        table = table.filter(table["_place"].is_valid())
    places = [str(file.parent / name) for name in table["_place"].to_pylist()]
    ids = pa.array([f"{split}/{number}/{row}" for row in range(len(places))], TEXT)
    if config.image_id_column:
        ids = _column(table, config.image_id_column, file, "image_id").cast(TEXT)
        if ids.null_count:
            raise ConfigError(f"{file}: {config.image_id_column} is empty in {ids.null_count} rows")
    columns = {
        "filepath": pa.array(places, TEXT),
        "split": pa.array([SPLIT_FOLDERS.get(split, split)] * len(places), TEXT),
        "image_id": ids,
    }
    classes = _classes(table, config.class_column, features)
    if classes is not None:
        columns["class"] = classes
    columns["caption"] = _captions(table, file, config, classes)
    used = {config.image_column, config.caption_column, config.class_column, "_place"}
    used |= {*SCHEMA.names, *columns}
    for name, column in zip(table.column_names, table.columns, strict=True):
        if name not in used and not _holds_bytes(column.type):
            columns[name] = column
    return pa.table(columns)


def _column(table: pa.Table, name: str, file: Path, what: str) -> pa.ChunkedArray:
    if name not in table.column_names:
        there = [column for column in table.column_names if column != "_place"]
        raise ConfigError(
            f"{file} has no column {name}; it has {', '.join(there)} "
            f"(data.{what}_column chooses another)"
        )
    return table[name]


def _captions(
    table: pa.Table, file: Path, config: HFDatasetConfig, classes: pa.Array | None
) -> pa.Array | pa.ChunkedArray:
    name = config.caption_column
    if classes is not None and (not name or (name == "caption" and name not in table.column_names)):
        words = [words_of(label or "") for label in classes.to_pylist()]
        return templated(words, text_or_templates(config.templates))
    if not name:
        return pa.nulls(table.num_rows, TEXT)
    column = _column(table, name, file, "caption")
    kind = column.type
    listed = pa.types.is_list(kind) or pa.types.is_large_list(kind)
    text = kind.value_type if listed else kind
    if not (pa.types.is_string(text) or pa.types.is_large_string(text)):
        raise ConfigError(f"{file}: the column {name} holds {kind}, not texts or lists of texts")
    return column.cast(pa.list_(TEXT) if listed else TEXT)


def _classes(table: pa.Table, name: str, features: dict[str, Any]) -> pa.Array | None:
    """What each picture shows, in the words of a ClassLabel or as it stands; None without any."""
    if not name or name not in table.column_names:
        return None
    column = table[name].combine_chunks()
    names = features.get(name, {}).get("names") if isinstance(features.get(name), dict) else None
    if names:
        labels = pa.array(names, TEXT)
        return labels.take(pc.if_else(pc.less(column, 0), None, column))  # -1: not known
    if pa.types.is_nested(column.type):
        return None
    return column.cast(TEXT)


def _holds_bytes(kind: pa.DataType) -> bool:
    """Whether a column holds bytes somewhere (other pictures), which no store wants."""
    if pa.types.is_nested(kind):
        return any(_holds_bytes(kind.field(i).type) for i in range(kind.num_fields))
    return bool(pa.types.is_binary(kind) or pa.types.is_large_binary(kind))
