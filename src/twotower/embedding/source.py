"""What `path=` names without a data section: a folder of pictures, a list or table, or tars."""

from __future__ import annotations

import re
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.csv as pa_csv
import pyarrow.parquet as pq

from twotower.config import DataConfig
from twotower.data.folder import list_pictures
from twotower.data.manifest import DELIMITERS, FILES_LOOKED_FOR, ManifestConfig, load_manifest
from twotower.data.pairs import Pair, PairTable, load_pairs
from twotower.data.places import file_of
from twotower.data.tar_names import is_remote
from twotower.data.webdataset import WebdatasetConfig, load_webdataset
from twotower.encode_config import EncodeConfig
from twotower.settings import ConfigError

TARS = (".tar", ".tar.gz", ".tgz")  # the compressed ones are refused where they are opened
KINDS = "a folder, a .csv, .tsv or .parquet table, a .txt list of files, or tars"


def pairs_to_encode(
    config: DataConfig, path: str | None, encode: EncodeConfig | None = None
) -> PairTable:
    """The source of an export: what `path` names if it is given, else the data section.

    A folder gives every picture in it, however deep, in the order of the paths and without
    captions; a `.csv`, `.tsv` or `.parquet` file its column `filepath` and, if there is one,
    `caption` or `captions`; a `.txt` file a picture a line. Tars, or a folder of them, give their
    samples as `data=webdataset` does.

    Args:
        encode: what its `image_key`, `caption_key` and `cache` say of tars.

    Raises:
        ConfigError: nothing is there, or it is none of these.
    """
    keys = _keys_of_tars(encode)
    if path is None:
        if keys:
            name = next(iter(keys))
            raise ConfigError(
                f"encode.{name} is for tars in path=...; with a data section set data.{name}"
            )
        return load_pairs(config)
    if not path:
        raise ConfigError(f"path= is empty; give {KINDS}")
    place = Path(path)
    if _names_tars(path):
        return _tars(path, keys)
    if place.is_dir():
        return _folder(place, keys)
    if not place.exists():
        raise ConfigError(f"path={path}: there is no such folder or file")
    suffix = Path(place.name.lower().removesuffix(".gz")).suffix
    if suffix == ".txt":
        return _list(place)
    if suffix not in (*DELIMITERS, ".parquet"):
        raise ConfigError(f"path={path} is not {KINDS.replace(', or ', ' or ')}")
    caption = "" if {"caption", "captions"}.isdisjoint(_columns(place, suffix)) else "caption"
    return load_manifest(ManifestConfig(manifest=path, caption_column=caption), bare=True)


def _keys_of_tars(encode: EncodeConfig | None) -> dict[str, Any]:
    """What is said of tars beyond the defaults."""
    names = ("image_key", "caption_key", "cache") if encode else ()
    return {name: getattr(encode, name) for name in names if getattr(encode, name)}


def _names_tars(path: str) -> bool:
    return all(is_remote(one) or one.strip().lower().endswith(TARS) for one in path.split("::"))


def _tars(path: str, keys: dict[str, Any]) -> PairTable:
    try:
        return load_webdataset(WebdatasetConfig(tars=path, val_fraction=0, **keys))
    except ConfigError as error:
        words = re.sub(r"\bdata\.tars\b", "path", str(error))
        raise ConfigError(re.sub(r"\bdata\.(?=image_key|cache\b)", "encode.", words)) from error


def _folder(folder: Path, keys: dict[str, Any]) -> PairTable:
    files = [str(file) for file in list_pictures(folder)]
    if files:
        pairs = (Pair(file, None, "", file) for file in files)
        return PairTable.from_pairs(pairs, folder, str(folder))
    if any(folder.glob("*.tar")):
        return _tars(str(folder), keys)
    raise ConfigError(f"{folder} has no pictures and no tars")


def _list(path: Path) -> PairTable:
    """The files that a text names, one a line; relative ones start from its folder."""
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path} is not UTF-8 text") from error
    files = [line.strip() for line in lines if line.strip()]
    pairs = PairTable.from_pairs(
        (Pair(file, None, "", file) for file in files), path.parent, str(path)
    )
    first = [pairs.path(row) for row in islice(range(len(pairs)), FILES_LOOKED_FOR)]
    if not any(file_of(file).exists() for file in first):
        raise ConfigError(
            f"{path}: there is no file {first[0]}, nor any of the first {len(first)}; each line is "
            "a path, and relative ones start from the folder of the list"
        )
    return pairs


def _columns(path: Path, suffix: str) -> list[str]:
    """The column names of a table; none where it cannot be read, which its loader explains."""
    try:
        if suffix == ".parquet":
            return list(pq.read_schema(path).names)
        options = pa_csv.ParseOptions(delimiter=DELIMITERS[suffix], newlines_in_values=True)
        return list(pa_csv.open_csv(path, parse_options=options).schema.names)
    except (OSError, pa.ArrowException):
        return []
