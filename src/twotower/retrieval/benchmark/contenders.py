"""What takes part: each index as it is, at several search settings, and FAISS's Flat tuned."""

from __future__ import annotations

import re
import statistics
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from typing import NamedTuple, Protocol

import torch

from twotower.benchmark_config import BenchmarkConfig
from twotower.retrieval.faiss_index import FaissIndex, import_faiss
from twotower.retrieval.index import FloatArray, VectorIndex

SETTINGS = {"nprobe": "nprobe", "efSearch": "ef_search"}  # of FaissConfig, by FAISS's names
TUNE_CALLS = 3  # of each setting in turn; the best median wins
TUNE_ONCE_SECONDS = 1.0  # a call that takes longer is made once


class Cell(NamedTuple):
    """Queries a call and results a query."""

    queries: int
    k: int

    def __str__(self) -> str:
        return f"Q={self.queries} k={self.k}"


def cells_text(cells: Iterable[Cell]) -> str:
    """Cells in few words: `Q=1,16 k=10`; those of other numbers of results behind a semicolon."""
    k_values: dict[int, list[int]] = {}
    for cell in sorted(cells):
        k_values.setdefault(cell.queries, []).append(cell.k)
    groups: dict[tuple[int, ...], list[int]] = {}
    for queries, found in k_values.items():
        groups.setdefault(tuple(found), []).append(queries)
    return "; ".join(
        f"Q={','.join(map(str, sizes))} k={','.join(map(str, found))}"
        for found, sizes in groups.items()
    )


class Contender(Protocol):
    """An index with its settings."""

    name: str
    setting: str
    index: VectorIndex

    def prepare(self, cell: Cell, queries: FloatArray) -> None:
        """Choose what is best for a cell, by trying."""

    @contextmanager
    def ready(self, cell: Cell) -> Iterator[None]:
        """Within it, searches of this cell run with the contender's settings."""

    def chosen(self, cell: Cell) -> str:
        """What `prepare` chose; empty if there is no choice."""


class Plain:
    """An index as it is, or at one value of a search parameter."""

    def __init__(self, name: str, index: VectorIndex, parameter: str = "", value: int = 0) -> None:
        self.name, self.index = name, index
        self.setting = f"{parameter}={value}" if parameter else ""
        self._parameter, self._value = parameter, value

    def prepare(self, cell: Cell, queries: FloatArray) -> None:
        """There is no choice."""

    @contextmanager
    def ready(self, cell: Cell) -> Iterator[None]:
        """Set the parameter: other contenders search the same index with other values."""
        if self._parameter:
            assert isinstance(self.index, FaissIndex)
            self.index.search_with(**{SETTINGS[self._parameter]: self._value})
        yield

    def chosen(self, cell: Cell) -> str:
        """There is no choice."""
        return ""


class TunedFlat:
    """FAISS's Flat at the best of its threads and of its threshold for the matrix product."""

    setting = "tuned"

    def __init__(self, name: str, index: VectorIndex) -> None:
        self.name, self.index = name, index
        self._best: dict[Cell, tuple[int, int]] = {}

    def prepare(self, cell: Cell, queries: FloatArray) -> None:
        """Time every setting that makes a difference, in turn, and keep the fastest."""
        settings = flat_settings(cell, queries.shape[1])
        times: dict[tuple[int, int], list[float]] = {each: [] for each in settings}
        for _ in range(TUNE_CALLS):
            for each in settings:
                with faiss_set(*each):
                    start = time.perf_counter()
                    self.index.search(queries, cell.k)
                    times[each].append(time.perf_counter() - start)
            if sum(map(sum, times.values())) > TUNE_ONCE_SECONDS * len(settings):
                break
        self._best[cell] = min(settings, key=lambda each: statistics.median(times[each]))

    @contextmanager
    def ready(self, cell: Cell) -> Iterator[None]:
        """Set what was found for the cell."""
        with faiss_set(*self._best[cell]) if cell in self._best else nullcontext():
            yield

    def chosen(self, cell: Cell) -> str:
        """The threads and the threshold."""
        if cell not in self._best:
            return ""
        threads, threshold = self._best[cell]
        return f"{threads} thread{'s' if threads > 1 else ''}, BLAS threshold {threshold:,}"


def flat_settings(cell: Cell, dim: int) -> list[tuple[int, int]]:
    """Threads and BLAS thresholds worth trying: powers of two up to all threads, with both paths.

    FAISS scans the rows once a query while queries x dim is below the threshold, else it multiplies
    matrices; a threshold of 1 lets it always multiply. Beyond, both paths are one.
    """
    most, usual = torch.get_num_threads(), faiss_threshold()
    threads = sorted({most} | {1 << n for n in range(most.bit_length()) if 1 << n < most})
    if cell.queries >= 64 * most:
        threads = [most]  # enough for each: fewer cannot be faster
    thresholds = [usual] if cell.queries * dim >= usual else [usual, 1]
    return [(count, threshold) for count in threads for threshold in thresholds]


def faiss_threshold() -> int:
    """FAISS's `distance_compute_blas_threshold`."""
    return int(import_faiss().cvar.distance_compute_blas_threshold)


@contextmanager
def faiss_set(threads: int, threshold: int) -> Iterator[None]:
    """Within it FAISS has so many threads and that BLAS threshold."""
    faiss = import_faiss()
    before = faiss.omp_get_max_threads(), faiss_threshold()
    faiss.omp_set_num_threads(threads)
    faiss.cvar.distance_compute_blas_threshold = threshold
    try:
        yield
    finally:
        faiss.omp_set_num_threads(before[0])
        faiss.cvar.distance_compute_blas_threshold = before[1]


def label(contender: Contender) -> str:
    """The index with its setting."""
    return f"{contender.name} {contender.setting}".strip()


def contenders_of(name: str, index: VectorIndex, config: BenchmarkConfig) -> list[Contender]:
    """An index at each value of its search parameter, or as it is, and Flat also tuned."""
    if name == "Flat":
        return [Plain(name, index), TunedFlat(name, index)]
    if isinstance(index, FaissIndex):
        parameter, values = search_parameter(name, config)
        if values:
            return [Plain(name, index, parameter, value) for value in values]
    return [Plain(name, index)]


def search_parameter(factory: str, config: BenchmarkConfig) -> tuple[str, list[int]]:
    """What sets recall against speed in a FAISS index, and the values that are tried."""
    if cells := re.search(r"\bIVF(\d+)(?![\dkM])", factory):
        most = int(cells[1])
        return "nprobe", sorted({min(value, most) for value in config.nprobe})
    if "IVF" in factory:
        return "nprobe", sorted(set(config.nprobe))
    return ("efSearch", sorted(set(config.ef_search))) if "HNSW" in factory else ("", [])
