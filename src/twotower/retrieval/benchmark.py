"""The exact index and FAISS indexes on the same rows and queries, in alternating rounds."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from twotower.config import BenchmarkConfig, Config, IndexConfig
from twotower.console import progress
from twotower.embedding.store import EmbeddingStore
from twotower.retrieval.benchmark_report import environment, report
from twotower.retrieval.build import build_index, gather, sample_positions
from twotower.retrieval.exact import ExactConfig, ExactIndex
from twotower.retrieval.faiss_index import FaissConfig
from twotower.retrieval.index import FloatArray, IdArray, SearchResult, VectorIndex
from twotower.runs import logs_path, store_path
from twotower.settings import ConfigError

log = logging.getLogger(__name__)

QUERY_POOL = 256  # distinct queries, at least, where the store has so many rows
CALLS = 32  # searches a round at one query a call; larger batches get fewer, so that all take alike
LEAST_CALLS = 20  # timed in all rounds, at least: a 95th percentile of fewer is their maximum


@dataclass(frozen=True)
class Measurement:
    """One index at one batch size.

    Attributes:
        index: `exact` or a FAISS factory string.
        queries: queries a call.
        calls: timed calls, all rounds together.
        build_seconds: from the store's files to an index that can be searched, training included.
        queries_per_second: over all timed calls; p50_ms, p95_ms: time of a call in milliseconds.
        recall: share of the k rows found that are among the exact k best (see `recall_at_k`).
        bytes_per_vector: of the whole index, ids included.
        note: why there are no figures.
    """

    index: str
    queries: int
    calls: int = 0
    build_seconds: float | None = None
    queries_per_second: float | None = None
    p50_ms: float | None = None
    p95_ms: float | None = None
    recall: float | None = None
    bytes_per_vector: float | None = None
    note: str = ""


class _Built(NamedTuple):
    searched: VectorIndex
    seconds: float
    recall: float


def benchmark_store(config: Config) -> None:
    """Measure the indexes of the benchmark section on a store; print and write the table.

    Queries are the store's captions where it has them, else its pictures.

    Raises:
        ConfigError: the store is missing, or k is beyond its rows.
    """
    if config.distributed.num_threads:
        torch.set_num_threads(config.distributed.num_threads)
    store = EmbeddingStore.open(store_path(config))
    if config.benchmark.k > len(store):
        raise ConfigError(
            f"benchmark.k is {config.benchmark.k}, but the store {store.folder} has {len(store)} "
            f"rows; use benchmark.k={len(store)} or less"
        )
    queries, what = draw_queries(store, max([QUERY_POOL, *config.benchmark.queries]), config.seed)
    about = {
        "store": str(store.folder),
        "rows": len(store),
        "dim": store.manifest.dim,
        "dtype": store.manifest.dtype,
        "metric": config.index.metric.name,
        "k": config.benchmark.k,
        "queries_are": what,
        "distinct_queries": len(queries),
        **environment(),
    }
    rows = compare_indexes(
        lambda index_config: build_index(index_config, store, seed=config.seed),
        queries,
        config.benchmark,
        config.index,
    )
    folder = Path(config.benchmark.output or logs_path(config) / "benchmark")
    report(rows, about, folder)


def draw_queries(store: EmbeddingStore, count: int, seed: int) -> tuple[FloatArray, str]:
    """At most `count` rows (Q, D), drawn by seed, of the captions or else pictures; and which."""
    shards = store.text_shards() if store.has_texts else store.image_shards()
    chosen = sample_positions(len(store), count, seed)
    what = "captions of the store" if store.has_texts else "pictures of the store itself"
    return gather(shards, chosen).astype(np.float32), what


def compare_indexes(
    build: Callable[[IndexConfig], VectorIndex],
    queries: FloatArray,
    config: BenchmarkConfig,
    like: IndexConfig,
) -> list[Measurement]:
    """Build and time every index of the section, each with the metric of `like`.

    An index that cannot be built, for want of rows to train on perhaps, gets a note for figures.
    """
    reference = build(_index_config("exact", like))
    assert isinstance(reference, ExactIndex)
    best = reference.search(queries, config.k)
    built: dict[str, _Built] = {}
    notes: dict[str, str] = {}
    for name in dict.fromkeys(config.indexes):
        log.info("building %s", name)
        started = time.perf_counter()
        try:
            index = build(_index_config(name, like))
            seconds = time.perf_counter() - started
            found = index.search(queries, config.k)
        except ConfigError as error:
            log.warning("%s", error)
            notes[name] = str(error)
            continue
        built[name] = _Built(index, seconds, recall_at_k(reference, queries, found.ids, best))
    times = _time_rounds({name: entry.searched for name, entry in built.items()}, queries, config)
    return [
        _measurement(name, size, built[name], times[name, size])
        if name in built
        else Measurement(name, size, note=notes[name])
        for size in dict.fromkeys(config.queries)
        for name in dict.fromkeys(config.indexes)
    ]


def _index_config(name: str, like: IndexConfig) -> IndexConfig:
    if name != "exact":
        return FaissConfig(factory=name, metric=like.metric)
    return like if isinstance(like, ExactConfig) else ExactConfig(metric=like.metric)


def recall_at_k(
    reference: ExactIndex, queries: FloatArray, found: IdArray, best: SearchResult
) -> float:
    """The share of found rows (Q, k) whose exact score reaches the k-th best one, or ties with it.

    Ids alone would count a row as missed that is as good as the one found in its place.
    """
    scores, ties = reference.score(queries, found)
    return float((scores >= best.scores[:, -1:] - ties).mean())


def _time_rounds(
    indexes: dict[str, VectorIndex], queries: FloatArray, config: BenchmarkConfig
) -> dict[tuple[str, int], list[float]]:
    """Seconds of every call, by index and batch size.

    The indexes take turns within a round: what else the machine does then hits all of them.
    """
    times: dict[tuple[str, int], list[float]] = {
        (name, size): [] for name in indexes for size in config.queries
    }
    with progress("benchmark", config.rounds, "rounds") as bar:
        for turn in range(config.rounds):
            for size in dict.fromkeys(config.queries):
                for name, index in indexes.items():
                    calls = _calls_a_round(size, config.rounds)
                    times[name, size] += _time_calls(index, queries, size, config.k, turn, calls)
            bar.advance()
    return times


def _calls_a_round(size: int, rounds: int) -> int:
    return max(CALLS // size, -(-LEAST_CALLS // rounds))


def _time_calls(
    index: VectorIndex, queries: FloatArray, size: int, k: int, turn: int, calls: int
) -> list[float]:
    index.search(np.resize(queries, (size, queries.shape[1])), k)  # its data into the caches again
    seconds = []
    for call in range(calls):
        first = (turn * calls + call) * size
        batch = queries[np.arange(first, first + size) % len(queries)]
        started = time.perf_counter()
        index.search(batch, k)
        seconds.append(time.perf_counter() - started)
    return seconds


def _measurement(name: str, size: int, built: _Built, seconds: list[float]) -> Measurement:
    p50, p95 = np.percentile(seconds, [50, 95]) * 1000
    return Measurement(
        index=name,
        queries=size,
        calls=len(seconds),
        build_seconds=built.seconds,
        queries_per_second=size * len(seconds) / sum(seconds),
        p50_ms=float(p50),
        p95_ms=float(p95),
        recall=built.recall,
        bytes_per_vector=built.searched.nbytes / len(built.searched),
    )
