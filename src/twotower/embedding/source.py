"""What `path=` names: a folder of pictures or a table of them, without a data section."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pyarrow.csv as pa_csv
import pyarrow.parquet as pq

from twotower.config import DataConfig
from twotower.data.folder import list_pictures
from twotower.data.manifest import DELIMITERS, ManifestConfig, load_manifest
from twotower.data.pairs import Pair, PairTable, load_pairs
from twotower.settings import ConfigError


def pairs_to_encode(config: DataConfig, path: str | None) -> PairTable:
    """The source of an export: what `path` names if it is given, else the data section.

    A folder gives every picture in it, however deep, in the order of the paths and without
    captions; a `.csv`, `.tsv` or `.parquet` file gives its column `filepath` and, if there is one,
    `caption`.

    Raises:
        ConfigError: nothing is there, or it is neither.
    """
    if path is None:
        return load_pairs(config)
    if not path:
        raise ConfigError("path= is empty; give a folder of pictures or a table of their paths")
    place = Path(path)
    if place.is_dir():
        return _folder(place)
    if not place.exists():
        raise ConfigError(f"path={path}: there is no such folder or file")
    suffix = Path(place.name.lower().removesuffix(".gz")).suffix
    if suffix not in (*DELIMITERS, ".parquet"):
        raise ConfigError(
            f"path={path} is neither a folder of pictures nor a .csv, .tsv or .parquet table of "
            "their paths"
        )
    caption = "caption" if "caption" in _columns(place, suffix) else ""
    return load_manifest(ManifestConfig(manifest=path, caption_column=caption))


def _folder(folder: Path) -> PairTable:
    files = [str(file) for file in list_pictures(folder)]
    if not files:
        raise ConfigError(f"{folder} has no pictures")
    return PairTable.from_pairs((Pair(file, None, "", file) for file in files), folder, str(folder))


def _columns(path: Path, suffix: str) -> list[str]:
    """The column names of a table; none where it cannot be read, which its loader explains."""
    try:
        if suffix == ".parquet":
            return list(pq.read_schema(path).names)
        options = pa_csv.ParseOptions(delimiter=DELIMITERS[suffix], newlines_in_values=True)
        return list(pa_csv.open_csv(path, parse_options=options).schema.names)
    except (OSError, pa.ArrowException):
        return []
