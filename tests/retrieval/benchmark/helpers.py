"""Rows, queries and sections that benchmarks of tests are made of."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np

from twotower.benchmark_config import BenchmarkConfig, QueryKind
from twotower.retrieval.benchmark.contenders import Cell
from twotower.retrieval.benchmark.data import Queries
from twotower.retrieval.index import AnyFloatArray, FloatArray, IdArray, SearchResult

NAMES = ["exact", "Flat", "IVF8,Flat", "IVF64,Flat", "SQ4"]


def some_rows(count: int, seed: int = 0) -> FloatArray:
    return np.random.default_rng(seed).standard_normal((count, 16)).astype(np.float32)


def section(**settings: object) -> BenchmarkConfig:
    few = {
        **{"indexes": NAMES, "queries": [1, 4], "k": 5, "rounds": 2},
        **{"nprobe": [2, 99], "ef_search": [16]},
    }
    return BenchmarkConfig(**{**few, **settings})  # type: ignore[arg-type]


class ArrayData:
    """Rows in memory, which are their own image queries; texts are others."""

    normalized = False
    ids: IdArray | None = None

    def __init__(self, rows: AnyFloatArray) -> None:
        self.rows = rows
        self.count, self.dim = rows.shape

    def chunks(self) -> Iterator[AnyFloatArray]:
        yield from (self.rows[:7], self.rows[7:])

    def sample(self, size: int, seed: int) -> AnyFloatArray:
        return self.rows[:size]

    def about(self) -> dict[str, object]:
        return {"data": "array"}

    def queries(self, count: int, seed: int) -> dict[QueryKind, Queries]:
        own = np.arange(min(count, self.count))
        return {
            QueryKind.image: Queries(self.rows[own].astype(np.float32), "rows", own),
            QueryKind.text: Queries(some_rows(23, seed=1), "others"),
        }


class Recorder:
    """A contender and its index, which writes down who was searched with how many queries."""

    setting = ""

    def __init__(self, name: str, calls: list[tuple[str, int]], interrupt_at: int = 0) -> None:
        self.name, self._calls, self._interrupt_at = name, calls, interrupt_at
        self.index = self  # type: ignore[assignment]
        self.prepared: list[Cell] = []

    def prepare(self, cell: Cell, queries: FloatArray) -> None:
        self.prepared.append(cell)

    @contextmanager
    def ready(self, cell: Cell) -> Iterator[None]:
        yield

    def chosen(self, cell: Cell) -> str:
        return ""

    def search(self, queries: AnyFloatArray, k: int) -> SearchResult:
        import signal

        self._calls.append((self.name, len(queries)))
        if len(self._calls) == self._interrupt_at:
            signal.raise_signal(signal.SIGINT)
        return SearchResult(np.zeros((0, k), np.float32), np.zeros((0, k), np.int64))
