"""Tars in webdataset's form (img2dataset writes them), local or remote, indexed and read in place.

Streaming a tar from its start would tie the order, the shares of ranks and workers, and the place
to resume at to the tars; with an index of their members all of it is what it is for files.
"""

from __future__ import annotations

import fcntl
import hashlib
import logging
import os
import re
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
import pyarrow.parquet as pq

from twotower.checkpoint.atomic import replacing
from twotower.console import progress
from twotower.data.pairs import DATASETS, PREPARERS, PairTable
from twotower.data.places import piece_name
from twotower.data.splits import SplitConfig, draw_splits
from twotower.data.table import SCHEMA
from twotower.data.tars import JSON, column_of, index_tar
from twotower.settings import ConfigError, setting

log = logging.getLogger(__name__)

VERSION = 1  # of the index files
TRIES = 3
BRACES = re.compile(r"\{([^{}]*)\}")
NUMBERS = re.compile(r"(\d+)\.\.(\d+)")


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
    pairs = PairTable(_concat(tables).combine_chunks(), root, config.tars)
    return pairs if val else draw_splits(pairs, config.val_fraction, config.split_seed)


def expand(pattern: str) -> list[str]:
    """The tars that a pattern names, in order.

    Raises:
        ConfigError: there is none, or a folder or a file that it names is not there.
    """
    found: list[str] = []
    for one in pattern.split("::"):
        for name in expand_braces(one.strip()):
            found += _glob(name)
    return found


def expand_braces(pattern: str) -> list[str]:
    """`{08..10}.tar` -> 08.tar, 09.tar, 10.tar; `{a,b}.tar` -> a.tar, b.tar; any number of them."""
    braces = BRACES.search(pattern)
    if braces is None:
        return [pattern]
    numbers = NUMBERS.fullmatch(braces[1])
    choices: Sequence[str] = braces[1].split(",")
    if numbers:
        first, last = int(numbers[1]), int(numbers[2])
        if last < first:
            raise ConfigError(f"{pattern}: {{{braces[1]}}} runs backwards")
        choices = [f"{n:0{len(numbers[1])}}" for n in range(first, last + 1)]
    before, after = pattern[: braces.start()], pattern[braces.end() :]
    return [name for choice in choices for name in expand_braces(before + choice + after)]


def _is_remote(name: str) -> bool:
    return "://" in name


def _glob(name: str) -> list[str]:
    """A name itself, or what its stars or its folder hold; local ones as absolute paths."""
    if _is_remote(name):
        if "*" not in name:
            return [name]
        system, path = _filesystem(name)
        found = [system.unstrip_protocol(match) for match in sorted(system.glob(path))]
    elif os.path.isdir(name):
        found = sorted(str(path.absolute()) for path in Path(name).glob("*.tar"))
    elif "*" in name:
        import glob

        found = sorted(os.path.abspath(match) for match in glob.glob(name))
    else:
        if not os.path.isfile(name):
            raise ConfigError(f"there is no tar {name}; data.tars must name tars or a folder")
        found = [os.path.abspath(name)]
    if not found:
        raise ConfigError(f"{name} has no tars; data.tars must name tars or a folder of them")
    return found


def _filesystem(url: str) -> tuple[Any, str]:
    import fsspec

    try:
        system, path = fsspec.core.url_to_fs(url)
    except ValueError as error:
        raise ConfigError(f"{url} cannot be opened: {error}") from error
    except ImportError as error:
        raise ConfigError(
            f"{url} cannot be opened: {error} (for http, pip install 'twotower[http]')"
        ) from error
    return system, path


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
    if not _is_remote(url):
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
    if _is_remote(url) and not tar.is_file():
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
    system, path = _filesystem(url)
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
    places = zip(*(index[c].to_pylist() for c in ("offset", "size", "name")), strict=True)
    text = pa.large_string()
    columns: dict[str, Any] = {
        "filepath": pa.array([piece_name(str(tar), *place) for place in places], text),
        "captions": index["captions"].cast(SCHEMA.field("captions").type),
        "split": pa.array([split] * len(index), text),
        "image_id": pa.array([f"{tar.stem}/{key}" for key in index["key"].to_pylist()], text),
        "key": index["key"].cast(text),
    }
    for name in index.column_names:
        plain = name.removeprefix(JSON)
        if (name == "class" or name.startswith(JSON)) and plain not in (*columns, "caption"):
            columns[plain] = index[name]
    return pa.table(columns)


def _concat(tables: Sequence[pa.Table]) -> pa.Table:
    """All tables as one; a column whose types do not agree becomes text."""
    try:
        return pa.concat_tables(tables, promote_options="permissive")
    except pa.ArrowException:
        extra = dict.fromkeys(c for table in tables for c in table.column_names)
        table = pa.concat_tables([table.select([*SCHEMA.names, "key"]) for table in tables])
        for name in list(extra)[len(SCHEMA.names) + 1 :]:
            values = [
                value
                for part in tables
                for value in (
                    part[name].to_pylist() if name in part.column_names else [None] * len(part)
                )
            ]
            table = table.append_column(name, column_of(values))
        return table
