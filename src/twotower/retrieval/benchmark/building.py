"""The indexes of a benchmark, built from the same rows, each with its time and its bytes."""

from __future__ import annotations

import dataclasses
import logging
import mmap
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from twotower.config import IndexConfig
from twotower.engine_config import Engine
from twotower.machine import free_bytes
from twotower.retrieval.benchmark.data import Data
from twotower.retrieval.exact import ExactConfig, ExactIndex, RowMemory
from twotower.retrieval.faiss_index import FaissConfig
from twotower.retrieval.index import INDEXES, AnyFloatArray, VectorIndex
from twotower.retrieval.scan.tiers import Tier
from twotower.settings import ConfigError

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Built:
    """An index, the seconds that it took from rows in memory or a saved folder, and its bytes."""

    index: VectorIndex
    seconds: float
    nbytes: int


def index_config(name: str, like: IndexConfig) -> IndexConfig:
    """The config of an index of the benchmark section, with the metric of `like`.

    Raises:
        ConfigError: `exact:` is followed by no tier, or `like` is not of this process.
    """
    if like.engine is not Engine.local:
        raise ConfigError(
            f"benchmark measures indexes in this process; leave out index.engine={like.engine.name}"
        )
    kind, _, tier = name.partition(":")
    if kind != "exact":
        return FaissConfig(factory=name, metric=like.metric)
    exact = like if isinstance(like, ExactConfig) else ExactConfig(metric=like.metric)
    if not tier:
        return exact
    if tier not in Tier.__members__:
        known = ", ".join(Tier.__members__)
        raise ConfigError(f"benchmark.indexes has {name}, but the tiers of exact are {known}")
    return dataclasses.replace(exact, tier=Tier[tier])


def build(config: IndexConfig, data: Data, seed: int) -> Built:
    """An index of all rows; the clock stands still while they are made, or read from the disk.

    Raises:
        ConfigError: the index cannot take them, for want of memory or of rows to train on perhaps.
    """
    check_memory(config, data)
    index = INDEXES.build(config, data.dim)
    seconds, first = 0.0, 0

    def timed(work: Callable[[], None]) -> None:
        nonlocal seconds
        start = time.perf_counter()
        work()
        seconds += time.perf_counter() - start

    if index.train_rows:
        sample = data.sample(index.train_rows, seed)
        timed(lambda: index.train(sample, normalized=data.normalized))
    for chunk in data.chunks():
        touch(chunk)
        ids = None if data.ids is None else data.ids[first : first + len(chunk)]
        timed(lambda chunk=chunk, ids=ids: index.add(chunk, ids, normalized=data.normalized))  # type: ignore[misc]
        first += len(chunk)
    return Built(index, seconds, index.nbytes)


def touch(rows: AnyFloatArray) -> None:
    """Read a byte of every page: else whoever is built first would wait for the store's files."""
    np.ascontiguousarray(rows).reshape(-1).view(np.uint8)[:: mmap.PAGESIZE].max(initial=0)


def check_memory(config: IndexConfig, data: Data) -> None:
    """Refuse an index that the machine has no memory for.

    Raises:
        ConfigError: about so many bytes are not free.
    """
    needed, free = data.count * data.dim * bytes_a_value(config), free_bytes()
    if free is not None and needed > free:
        name = config.factory if isinstance(config, FaissConfig) else config.registered_name
        raise ConfigError(
            f"{name} would need about {needed / 1e9:.1f} GB for {data.count:,} rows, but "
            f"{free / 1e9:.1f} GB are free; all indexes are in memory together, so choose fewer "
            "with benchmark.indexes, or fewer rows"
        )


def bytes_a_value(config: IndexConfig) -> float:
    """About the bytes of an index by rows and dimensions."""
    if isinstance(config, ExactConfig):
        rows = {RowMemory.fp32: 4, RowMemory.fp16: 2, RowMemory.stored: 0}
        return 1.0 + rows[config.memory]
    factory = config.factory if isinstance(config, FaissConfig) else ""
    for part, size in (("Refine", 4.0), ("RFlat", 4.0), ("PQ", 0.5), ("RaBitQ", 0.5), ("LSH", 0.5)):
        if part in factory:
            return size
    return (2.0 if "fp16" in factory else 1.0) if "SQ" in factory else 4.0


def build_all(
    names: Sequence[str], like: IndexConfig, data: Data, seed: int
) -> tuple[ExactIndex, dict[str, Built], dict[str, str]]:
    """The exact index that answers are held against, each index by its name, and why one is not.

    Raises:
        ConfigError: a tier is not known, or the exact index cannot be built.
    """
    configs = {name: index_config(name, like) for name in names}
    log.info("building exact")
    exact = build(index_config("exact", like), data, seed)
    assert isinstance(exact.index, ExactIndex)
    built: dict[str, Built] = {}
    notes: dict[str, str] = {}
    for name, config in configs.items():
        if name == "exact":
            built[name] = exact
            continue
        log.info("building %s", name)
        try:
            built[name] = build(config, data, seed)
        except ConfigError as error:
            log.warning("%s", error)
            notes[name] = str(error)
    return exact.index, built, notes


def open_saved(
    folders: Sequence[str], like: IndexConfig, data: Data, taken: Sequence[str] = ()
) -> dict[str, Built]:
    """The saved indexes, by the names of their folders; by their paths where a name is another's.

    Raises:
        ConfigError: a folder has no index of these rows.
    """
    names = [Path(os.path.abspath(folder)).name for folder in folders]
    opened, others = {}, [*names, *taken]
    for name, folder in zip(names, folders, strict=True):
        log.info("opening %s", folder)
        start = time.perf_counter()
        index = data.saved(folder, like)
        built = Built(index, time.perf_counter() - start, index.nbytes)
        opened[name if others.count(name) == 1 else folder] = built
    return opened
