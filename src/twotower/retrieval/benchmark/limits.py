"""What this machine can do at best, and how much of it a search uses.

Measured with what is installed, without a compiler: reading is the better of two sums over 256 MB
on huge pages, arithmetic the better of torch's and numpy's product of 8192 x 512 and 512 x 1024,
and torch's int8 product of the same shape. A hand-written kernel may do better than these, so a
share may be above 1.
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch

from twotower.config import IndexConfig
from twotower.retrieval.exact import ExactConfig, RowMemory
from twotower.retrieval.scan.codes import huge_pages
from twotower.retrieval.scan.tiers import Tier, choose_tier
from twotower.retrieval.scan.torch_scan import probe

READ_BYTES = 1 << 28
SHAPE = (8192, 512, 1024)
CODE_BYTES = 12  # a row's scale, error and norm, beside its codes


class Rates(NamedTuple):
    """Bytes read a second, and operations a second; None where it cannot be measured."""

    read: float
    fp32: float
    int8: float | None


class Work(NamedTuple):
    """The least that a call must do: bytes to read, multiplications and additions, their type."""

    bytes: float
    operations: float
    int8: bool


class Share(NamedTuple):
    """Work divided by time and by what the machine can do: of reading, and of arithmetic."""

    read: float
    arithmetic: float | None

    @property
    def larger(self) -> tuple[float, str]:
        """The limit that is nearer, and its name."""
        if self.arithmetic is None or self.read >= self.arithmetic:
            return self.read, "read"
        return self.arithmetic, "arith"


class Limits:
    """Measures the machine once a round, between the searches."""

    def __init__(self) -> None:
        self._readings: list[Rates] = []
        memory = huge_pages(READ_BYTES)
        memory[:] = 1
        wide = torch.from_numpy(memory)
        self._reads = [wide.view(torch.int64), wide.view(torch.float32).view(16, -1)]
        rng = np.random.default_rng(0)
        rows, inner, queries = SHAPE
        self._fp32 = [
            torch.from_numpy(rng.standard_normal(shape, np.float32))
            for shape in ((rows, inner), (inner, queries))
        ]
        self._int8 = [
            torch.from_numpy(rng.integers(-127, 128, shape, np.int8))
            for shape in ((rows, inner), (inner, queries))
        ]

    def measure(self) -> None:
        """Take one more reading, some tenths of a second."""
        a, b = self._fp32
        out = torch.empty(SHAPE[0], SHAPE[2])
        products: list[Callable[[], object]] = [lambda: torch.mm(a, b, out=out)]
        if numpy_threads() == torch.get_num_threads():
            products.append(lambda: np.matmul(a.numpy(), b.numpy(), out=out.numpy()))
        operations = 2.0 * SHAPE[0] * SHAPE[1] * SHAPE[2]
        int8 = None
        if probe().right:
            whole = torch.empty(SHAPE[0], SHAPE[2], dtype=torch.int32)
            int8 = operations / _seconds([lambda: torch._int_mm(*self._int8, out=whole)])
        reads: list[Callable[[], object]] = [self._reads[0].sum, lambda: self._reads[1].sum(1)]
        self._readings.append(
            Rates(READ_BYTES / _seconds(reads), operations / _seconds(products), int8)
        )

    def median(self) -> Rates | None:
        """Of all readings; None before the first."""
        if not self._readings:
            return None
        read, fp32, int8 = zip(*self._readings, strict=True)
        known = [rate for rate in int8 if rate is not None]
        return Rates(
            statistics.median(read),
            statistics.median(fp32),
            statistics.median(known) if known else None,
        )


def _seconds(calls: list[Callable[[], object]]) -> float:
    """The time of the fastest, each called twice: at first threads sleep and caches are cold."""
    times = []
    for call in calls:
        for _ in range(2):
            start = time.perf_counter()
            call()
            times.append(time.perf_counter() - start)
    return min(times)


def numpy_threads() -> int:
    """The threads of numpy's matrix product, as far as the environment tells them."""
    for name in ("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS"):
        value = os.environ.get(name, "")
        if value.isdigit():
            return int(value)
    return len(os.sched_getaffinity(0))


def least_work(
    config: IndexConfig, factory: str, rows: int, dim: int, queries: int, k: int
) -> Work | None:
    """What one call must do at least, if every row is compared; None for an approximate index.

    All rows are read once a call: their fp32 values, or for the int8 tiers of the exact index the
    codes, `dim` bytes rounded up to 8, and 12 bytes beside them. A row and a query are `dim`
    multiplications and as many additions. The re-ranking of the exact index is not counted.
    """
    operations = 2.0 * rows * dim * queries
    if isinstance(config, ExactConfig):
        # Where most rows are wanted the exact index scans fp32, whatever the tier.
        if choose_tier(config.tier) is not Tier.reference and 4 * k <= rows:
            return Work(rows * (-(-dim // 8) * 8 + CODE_BYTES), operations, True)
        size = 2 if config.memory is RowMemory.fp16 else 4
        return Work(rows * dim * size, operations, False)
    return Work(rows * dim * 4, operations, False) if factory == "Flat" else None


def share_of(work: Work, seconds: float, rates: Rates) -> Share:
    """How near a call of so many seconds comes to what the machine can do."""
    rate = rates.int8 if work.int8 else rates.fp32
    arithmetic = None if rate is None else work.operations / seconds / rate
    return Share(work.bytes / seconds / rates.read, arithmetic)
