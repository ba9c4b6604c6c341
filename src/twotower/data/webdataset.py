"""Tars in webdataset's form (img2dataset writes them), local or remote, indexed and read in place.

Streaming a tar from its start would tie the order, the shares of ranks and workers, and the place
to resume at to the tars; with an index of their members all of it is what it is for files.
"""

from __future__ import annotations

import fcntl
import hashlib
import logging
import os
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from twotower.checkpoint.atomic import replacing
from twotower.console import progress
from twotower.data.pairs import DATASETS, PREPARERS, PairTable
from twotower.data.places import piece_names
from twotower.data.splits import SplitConfig, draw_splits
from twotower.data.table import SCHEMA, concat_as_text
from twotower.data.tar_names import expand, filesystem, is_remote
from twotower.data.tars import JSON, index_tar
from twotower.settings import ConfigError, setting

log = logging.getLogger(__name__)

VERSION = 2  # of the index files
TRIES = 3


@dataclass(kw_only=True)
class WebdatasetConfig(SplitConfig):
    """Tars of pictures with their captions, as img2dataset writes them."""

    tars: str = setting(
        "",
        "the tars: a path or URL with braces or stars, as data/{00000..00012}.tar, a folder of "
        "them, or several of these with :: between",
    )
    val_tars: str = setting("", "tars that validate; without any, val_fraction of all images does")
    image_key: str = setting("jpg;jpeg;png;webp", "extensions of pictures; the first found counts")
    caption_key: str = setting(
        "txt;json.caption", "extensions of captions or json.<field>; the first found counts"
    )
    cache: str = setting(
        "dataset/webdataset", "folder of the tars' indexes, and of the copies of remote tars"
    )
    connections: int = setting(8, "tars that are fetched or indexed at a time", ge=1, le=64)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.image_key.strip():
            raise ConfigError("data.image_key is empty; give an extension of pictures, as in jpg")


@PREPARERS.register("webdataset", WebdatasetConfig)
def prepare_webdataset(config: WebdatasetConfig) -> None:
    """Fetch the tars that are remote and index all of them; what is there already is kept.

    Raises:
        ConfigError: as `load_webdataset`.
    """
    load_webdataset(config)


@DATASETS.register("webdataset", WebdatasetConfig)
def load_webdataset(config: WebdatasetConfig) -> PairTable:
    """The samples that have a picture, tar by tar; the fields of their JSON are columns.

    Raises:
        ConfigError: a tar is missing or damaged, or none has a picture.
    """
    if not config.tars:
        raise ConfigError(
            "data.tars is not given; set it to tars, as in data.tars='data/{00000..00012}.tar'"
        )
    train, val = expand(config.tars), expand(config.val_tars) if config.val_tars else []
    twice = [url for url, count in Counter(train + val).items() if count > 1]
    if twice:
        raise ConfigError(f"{twice[0]} is named twice in data.tars and data.val_tars")
    indexed = dict(zip(train + val, _index_all(train + val, config), strict=True))
    if not any(len(index) for _, index in indexed.values()):
        raise ConfigError(
            f"no tar of {config.tars} has pictures under data.image_key={config.image_key}"
        )
    root = Path(os.path.commonpath([tar.parent for tar, _ in indexed.values()]))
    validates = set(val)
    tables = [
        _standard(index, tar.relative_to(root), "val" if url in validates else "train")
        for url, (tar, index) in indexed.items()
        if len(index)  # img2dataset leaves an empty tar where no download succeeded
    ]
    table = _with_own_ids(concat_as_text(tables)).combine_chunks()
    pairs = PairTable(table, root, config.tars)
    return pairs if val else draw_splits(pairs, config.val_fraction, config.split_seed)


def _index_all(urls: Sequence[str], config: WebdatasetConfig) -> list[tuple[Path, pa.Table]]:
    """Each tar's local file and its index; one process at a time makes what is missing."""
    cache = Path(config.cache)
    found = {url: _indexed(url, config) for url in urls}
    missing = [url for url, index in found.items() if index is None]
    if missing:
        with (
            _locked(cache),
            progress("indexing tars", len(missing), "tars") as line,
            ThreadPoolExecutor(config.connections) as pool,
        ):
            for url, index in zip(missing, pool.map(partial(_make, config), missing), strict=True):
                found[url] = index
                line.advance()
    return [(_local(url, cache), index) for url, index in found.items() if index is not None]


def _local(url: str, cache: Path) -> Path:
    """Where a tar lies, or the copy of a remote one will."""
    if not is_remote(url):
        return Path(url)
    folder, _, name = url.rpartition("/")
    return cache.absolute() / f"tars-{_short(folder)}" / name


def _indexed(url: str, config: WebdatasetConfig) -> pa.Table | None:
    """The index of a tar, if it is in the cache and neither the tar nor the keys have changed."""
    tar = _local(url, Path(config.cache))
    path = _index_path(tar, url, config) if tar.is_file() else None
    return pq.read_table(path) if path is not None and path.is_file() else None


def _index_path(tar: Path, url: str, config: WebdatasetConfig) -> Path:
    state = tar.stat()
    keys = (config.image_key, config.caption_key)
    mark = _short(repr((VERSION, url, state.st_size, state.st_mtime_ns, *keys)))
    return Path(config.cache) / f"{tar.stem}-{mark}.parquet"


def _make(config: WebdatasetConfig, url: str) -> pa.Table:
    """The index of a tar, which is fetched and indexed now if no other process has done so."""
    made = _indexed(url, config)
    if made is not None:
        return made
    tar = _local(url, Path(config.cache))
    if is_remote(url) and not tar.is_file():
        _fetch(url, tar)
    index = index_tar(tar, config.image_key, config.caption_key)
    with replacing(_index_path(tar, url, config)) as partial_file:
        pq.write_table(index, partial_file)
    return index


@contextmanager
def _locked(cache: Path) -> Iterator[None]:
    try:
        cache.mkdir(parents=True, exist_ok=True)
        lock = (cache / ".lock").open("w")
    except OSError as error:
        raise ConfigError(
            f"data.cache={cache} cannot be written ({error.strerror}); choose another folder"
        ) from error
    with lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _fetch(url: str, copy: Path) -> None:
    """Copy a remote tar."""
    system, path = filesystem(url)
    with replacing(copy) as partial_file:
        for left in reversed(range(TRIES)):
            try:
                system.get_file(path, str(partial_file))
                break
            except FileNotFoundError as error:
                raise ConfigError(f"there is no tar {url}") from error
            except Exception as error:  # a file system of fsspec may raise what its library does
                if not left:
                    raise ConfigError(f"{url} cannot be fetched: {error}") from error
                time.sleep(TRIES - left)


def _short(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def _standard(index: pa.Table, tar: Path, split: str) -> pa.Table:
    """An index as a table of pairs, with the fields of the JSON under their own names."""
    text = pa.large_string()
    stem, key = pa.scalar(str(tar.with_suffix("")), text), index["key"].cast(text)
    columns: dict[str, Any] = {
        "filepath": piece_names(str(tar), *(index[c] for c in ("offset", "size", "name"))),
        "captions": index["captions"].cast(SCHEMA.field("captions").type),
        "split": pa.array([split] * len(index), text),
        "image_id": pc.binary_join_element_wise(stem, key, pa.scalar("/", text)),
        "key": key,
    }
    for name in index.column_names:
        plain = name.removeprefix(JSON)
        if (name == "class" or name.startswith(JSON)) and plain not in (*columns, "caption"):
            columns[plain] = index[name]
    return pa.table(columns)


def _with_own_ids(table: pa.Table) -> pa.Table:
    """An id for each sample: its place where a tar has a key more than once."""
    if pc.count_distinct(table["image_id"]).as_py() == len(table):
        return table
    column = table.schema.get_field_index("image_id")
    return table.set_column(column, "image_id", table["filepath"])
