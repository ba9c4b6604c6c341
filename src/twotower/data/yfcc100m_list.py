"""What to download of YFCC100M: the photographs of a subset list, with the texts of the metadata.

The metadata have 100 million lines; they are read once, in a stream, and what is wanted is kept.
"""

from __future__ import annotations

import bz2
import gzip
import html
import logging
import re
import sqlite3
from collections.abc import Iterator
from contextlib import closing
from itertools import islice
from pathlib import Path
from typing import IO, NamedTuple
from urllib.parse import unquote_plus

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv as pa_csv
import pyarrow.parquet as pq

from twotower.checkpoint.atomic import replacing
from twotower.settings import ConfigError

log = logging.getLogger(__name__)

SCHEMA = pa.schema(
    [
        ("photo_id", pa.int64()),
        ("hash", pa.string()),
        ("url", pa.string()),
        ("title", pa.string()),
        ("description", pa.string()),
    ]
)
NAMES = ("photo_id", "title", "description", "url")
LINES = 50_000  # read at a time
TAG = re.compile(r"<[^>]*>")
CAMERA_NAME = re.compile(
    r"(img|dsc[nf]?|p|_mg|pict|image|photo|picture)?[-_ ]?\d[-_ \d]*(\.\w+)?", re.I
)


class Fields(NamedTuple):
    """Where a line of metadata has what: places of its tab-separated fields."""

    photo_id: int
    title: int
    description: int
    url: int
    marker: int


# Releases with the line number and the hash, with the hash, with neither.
RELEASES = {
    25: Fields(1, 8, 9, 16, 24),
    24: Fields(0, 7, 8, 15, 23),
    23: Fields(0, 6, 7, 14, 22),
}


def select(subset: Path, metadata: list[Path], output: Path) -> int:
    """Write the subset's photographs with their texts as Parquet, and return how many they are.

    Raises:
        ConfigError: a file cannot be read, or its lines are not those of YFCC100M.
    """
    ids, hashes = read_subset(subset)
    count = 0
    with replacing(output) as partial, pq.ParquetWriter(partial, SCHEMA) as writer:
        for path in metadata:
            for columns in _chunks(path):
                numbers = np.array(columns.pop("photo_id"), np.int64)
                place = np.minimum(np.searchsorted(ids, numbers), len(ids) - 1)
                rows = np.flatnonzero(ids[place] == numbers)
                if not len(rows):
                    continue
                chosen = {name: [column[row] for row in rows] for name, column in columns.items()}
                found = {"photo_id": numbers[rows], "hash": hashes.take(pa.array(place[rows]))}
                writer.write_table(pa.table({**found, **chosen}, schema=SCHEMA))
                count += len(rows)
        if not count:
            raise ConfigError(f"{metadata[0]} has none of the {len(ids):,} photographs of {subset}")
    log.info("%s: %d of %d photographs have metadata", subset, count, len(ids))
    return count


def read_subset(path: Path) -> tuple[npt.NDArray[np.int64], pa.Array]:
    """Photo ids, sorted, and their hashes, of the list: line number, photo id, hash.

    Raises:
        ConfigError: it cannot be read, or is another file.
    """
    try:
        with pa.input_stream(str(path), compression="detect") as file:
            table = pa_csv.read_csv(
                file,
                pa_csv.ReadOptions(column_names=["line", "photo_id", "hash"]),
                pa_csv.ParseOptions(delimiter="\t", quote_char=False),
                pa_csv.ConvertOptions(
                    column_types={"photo_id": pa.int64(), "hash": pa.large_string()}
                ),
            )
    except (OSError, pa.ArrowException) as error:
        raise ConfigError(
            f"{path} is no list of line number, photo id and hash: {str(error).splitlines()[0]}"
        ) from error
    if not table.num_rows:
        raise ConfigError(f"{path} is empty")
    # Hashes become parts of addresses and of paths.
    odd = table.filter(pc.invert(pc.match_substring_regex(table["hash"], "^[0-9a-f]{7,}$")))
    if len(odd):
        raise ConfigError(f"{path} is no list of line number, photo id and hash: {odd['hash'][0]}")
    ids = table["photo_id"].to_numpy()
    order = np.argsort(ids, kind="stable")
    hashes = pa.concat_arrays(table["hash"].chunks)
    return ids[order], hashes.take(pa.array(order))


def _opened(path: Path) -> IO[bytes]:
    if path.suffix == ".bz2":
        return bz2.open(path)
    return gzip.open(path) if path.suffix == ".gz" else path.open("rb")  # type: ignore[return-value]


def _chunks(path: Path) -> Iterator[dict[str, list[str]]]:
    """The photographs of a metadata file, some at a time, as columns."""
    return _chunks_of_database(path) if path.suffix == ".sql" else _chunks_of_text(path)


def _chunks_of_database(path: Path) -> Iterator[dict[str, list[str]]]:
    query = "SELECT photoid, title, description, downloadurl FROM yfcc100m_dataset WHERE marker = 0"
    try:
        with closing(sqlite3.connect(f"{path.absolute().as_uri()}?mode=ro", uri=True)) as database:
            cursor = database.execute(query)
            while rows := cursor.fetchmany(LINES):
                columns = ([value or "" for value in column] for column in zip(*rows, strict=True))
                yield dict(zip(NAMES, columns, strict=True))
    except sqlite3.Error as error:
        raise ConfigError(f"{path} is no database of YFCC100M's metadata: {error}") from error


def _chunks_of_text(path: Path) -> Iterator[dict[str, list[str]]]:
    fields: Fields | None = None
    try:
        with _opened(path) as file:
            while lines := list(islice(file, LINES)):
                split = [line.decode(errors="replace").rstrip("\r\n").split("\t") for line in lines]
                fields = fields or RELEASES.get(len(split[0]))
                if fields is None:
                    raise ConfigError(
                        f"{path} has {len(split[0])} columns; YFCC100M's metadata have 23 to 25"
                    )
                photos = [
                    row
                    for row in split
                    if len(row) > fields.marker
                    and row[fields.marker] == "0"
                    and row[fields.photo_id].isdecimal()
                ]
                yield {name: [row[getattr(fields, name)] for row in photos] for name in NAMES}
    except (OSError, EOFError) as error:
        raise ConfigError(f"{path} cannot be read: {error}") from error


def clean(text: str) -> str:
    """A title or a description as a caption: decoded, without markup; empty for a camera's name."""
    plain = html.unescape(TAG.sub(" ", html.unescape(unquote_plus(text))))
    words = " ".join(plain.split())
    return "" if CAMERA_NAME.fullmatch(words) else words
