"""YFCC100M: the 14,829,396 photographs of OpenAI's list, downloaded by `twotower prepare`.

Thomee et al. 2016; the list: https://github.com/openai/CLIP/blob/main/data/yfcc100m.md
"""

from __future__ import annotations

import csv
import enum
import logging
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from twotower.checkpoint.atomic import replacing
from twotower.data.downloads import Download, Fetcher, State, download_all, is_in, read_record
from twotower.data.manifest import ManifestConfig, load_manifest
from twotower.data.pairs import DATASETS, PREPARERS, PairTable
from twotower.data.splits import SplitConfig
from twotower.data.yfcc100m_list import clean, select
from twotower.settings import ConfigError, setting

log = logging.getLogger(__name__)

LISTS = ("yfcc100m_subset_data.tsv", "yfcc100m_subset_data.tsv.bz2")
METADATA = ("yfcc100m_dataset*", "new_metadata.csv*")
SELECTED = "selected.parquet"
RECORD = "downloads.tsv"
HEADER = ("filepath", "caption", "split", "image_id", "url")
SPLIT_FILES = {"train": "train.tsv", "val": "dev.tsv"}
BUCKET = (
    "https://multimedia-commons.s3-us-west-2.amazonaws.com/data/images/{hash_1}/{hash_2}/{hash}.jpg"
)
FIELDS = ("{hash}", "{hash_1}", "{hash_2}", "{photo_id}", "{url}")


class Texts(enum.Enum):
    """What becomes a caption."""

    both = "both"
    title = "title"
    description = "description"


@dataclass(kw_only=True)
class Yfcc100mConfig(SplitConfig):
    """Photographs of Flickr with titles and descriptions, under Creative Commons licences."""

    folder: str = setting("dataset/yfcc100m", "folder of the lists, the pictures and the splits")
    texts: Texts = setting(Texts.both, "both (two captions), title or description")
    url: str = setting(
        "",
        "where a picture is, with {hash}, its first ({hash_1}) and next ({hash_2}) three digits, "
        "{photo_id} or, as in the metadata, {url}; empty: the bucket of Multimedia Commons",
    )
    limit: int = setting(0, "take the first so many photographs; 0 is all", ge=0)
    connections: int = setting(16, "downloads at a time", ge=1, le=256)
    per_second: float = setting(100.0, "requests a second at most; 0 sets no limit", ge=0)
    timeout: float = setting(20.0, "seconds that a server may be silent", gt=0)
    tries: int = setting(4, "requests for a picture before it is left to the next run", ge=1)
    pause: float = setting(1.0, "seconds before a second request, doubled each time", ge=0)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.url and not any(field in self.url for field in FIELDS):
            raise ConfigError(f"data.url must hold one of {' '.join(FIELDS)}, not {self.url!r}")


@DATASETS.register("yfcc100m", Yfcc100mConfig)
def load_yfcc100m(config: Yfcc100mConfig) -> PairTable:
    """The pictures of train.tsv and, as the split val, dev.tsv.

    Raises:
        ConfigError: the data set is not prepared, or a file is malformed.
    """
    root = Path(config.folder)
    paths = [root / name for name in SPLIT_FILES.values()]
    if not any(path.is_file() for path in paths):
        raise ConfigError(
            f"{root} has no train.tsv and dev.tsv; run `twotower prepare data=yfcc100m` first"
        )
    parts = [
        load_manifest(ManifestConfig(manifest=str(path), root=str(root)))
        for path in paths
        if path.is_file()
    ]
    # A column without a value in one of the files has no type there.
    table = pa.concat_tables([part.table for part in parts], promote_options="permissive")
    return PairTable(table, root, "yfcc100m")


@PREPARERS.register("yfcc100m", Yfcc100mConfig)
def prepare_yfcc100m(config: Yfcc100mConfig) -> None:
    """Select, download, and write train.tsv and dev.tsv; each run goes on where the last ended.

    Raises:
        ConfigError: a list is missing, or the network or the disk fails.
    """
    root = Path(config.folder)
    selected = root / SELECTED
    if not selected.is_file():
        select(*_lists(root), selected)
    rows = pq.ParquetFile(selected)
    total = min(rows.metadata.num_rows, config.limit or rows.metadata.num_rows)
    jobs = (
        Download(row["photo_id"], _url(row, config.url or BUCKET), root / _file(row))
        for row in _rows(rows, total)
    )
    fetcher = Fetcher(
        config.connections, config.per_second, config.timeout, config.tries, config.pause
    )
    counts = download_all(jobs, total, root / RECORD, fetcher)
    log.info(
        "%s: %d pictures are there, %d are gone, %d failed and are left to the next run",
        *(root, counts[State.ok], counts[State.gone], counts[State.failed]),
    )
    _write_splits(root, _rows(rows, total), config)


def _lists(root: Path) -> tuple[Path, list[Path]]:
    subset = next((path for name in LISTS if (path := root / name).is_file()), None)
    if subset is None:
        raise ConfigError(
            f"{root} has no {LISTS[0]}; download "
            "https://openaipublic.azureedge.net/clip/data/yfcc100m_subset_data.tsv.bz2 into it"
        )
    found = (_each_once(sorted(root.glob(pattern))) for pattern in METADATA)
    metadata = next((paths for paths in found if paths), [])
    if not metadata:
        raise ConfigError(
            f"{root} has no metadata (yfcc100m_dataset, also as .bz2, .gz or .sql, or "
            "new_metadata.csv); ask for them at https://multimediacommons.org"
        )
    return subset, metadata


def _each_once(paths: Iterable[Path]) -> list[Path]:
    """One form of each file: unpacked beside packed, the metadata would count twice."""
    forms: dict[str, Path] = {}
    for path in paths:
        forms.setdefault(re.sub(r"(\.bz2|\.gz|\.sql)$", "", path.name), path)
    return list(forms.values())


def _rows(file: pq.ParquetFile, total: int) -> Iterator[dict[str, Any]]:
    for batch in file.iter_batches(batch_size=10_000):
        yield from batch.to_pylist()[:total]
        total -= len(batch)
        if total <= 0:
            return


def _file(row: dict[str, Any]) -> str:
    """Where a picture goes: 4,096 folders, so that none has millions of files."""
    return f"data/{row['hash'][:3]}/{row['photo_id']}.jpg"


def _url(row: dict[str, Any], template: str) -> str:
    digits = row["hash"]
    values = (digits, digits[:3], digits[3:6], str(row["photo_id"]), row["url"])
    for field, value in zip(FIELDS, values, strict=True):
        template = template.replace(field, value)
    return template


def _write_splits(root: Path, rows: Iterator[dict[str, Any]], config: Yfcc100mConfig) -> None:
    """Write the pictures that are there and have a caption, split by a hash of their ids."""
    _, settled = read_record(root / RECORD)
    images: Counter[str] = Counter()
    with (
        replacing(root / SPLIT_FILES["train"]) as train,
        replacing(root / SPLIT_FILES["val"]) as val,
        train.open("w", newline="", encoding="utf-8") as train_file,
        val.open("w", newline="", encoding="utf-8") as val_file,
    ):
        writers = {
            split: csv.writer(file, delimiter="\t", lineterminator="\n")
            for split, file in (("train", train_file), ("val", val_file))
        }
        for writer in writers.values():
            writer.writerow(HEADER)
        for row in rows:
            if not is_in(settled, row["photo_id"]) or not (root / _file(row)).is_file():
                continue
            split = "val" if _validates(row["photo_id"], config) else "train"
            captions = _captions(row, config.texts)
            images[split] += bool(captions)
            for caption in captions:
                line = (_file(row), caption, split, row["photo_id"], row["url"])
                writers[split].writerow(line)
        if not images.total():
            raise ConfigError(f"{root} has no picture with a caption")
    for split, name in SPLIT_FILES.items():
        if not images[split]:
            (root / name).unlink()


def _validates(photo_id: int, config: Yfcc100mConfig) -> bool:
    key = str(config.split_seed).encode()
    digest = blake2b(str(photo_id).encode(), digest_size=8, key=key).digest()
    return int.from_bytes(digest, "big") < config.val_fraction * 2**64


def _captions(row: dict[str, Any], texts: Texts) -> list[str]:
    names = ("title", "description") if texts is Texts.both else (texts.value,)
    return list(dict.fromkeys(text for name in names if (text := clean(row[name]))))
