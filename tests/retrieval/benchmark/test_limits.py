from __future__ import annotations

import math

import pytest
import torch

from twotower.retrieval.benchmark import limits
from twotower.retrieval.benchmark.limits import Limits, Rates, Work, least_work, share_of
from twotower.retrieval.exact import ExactConfig, RowMemory
from twotower.retrieval.faiss_index import FaissConfig
from twotower.retrieval.scan.tiers import Tier
from twotower.retrieval.scan.torch_scan import probe


def test_the_least_work_is_every_row_once_a_call() -> None:
    shape = (1000, 509, 7, 10)
    operations = 2.0 * 1000 * 509 * 7
    fp32 = Work(1000 * 509 * 4, operations, False)
    reference = ExactConfig(tier=Tier.reference)
    assert least_work(reference, "exact", *shape) == fp32
    assert least_work(FaissConfig(), "Flat", *shape) == fp32
    assert least_work(FaissConfig(factory="SQ8"), "SQ8", *shape) is None
    half = ExactConfig(tier=Tier.reference, memory=RowMemory.fp16)
    assert least_work(half, "exact", *shape) == fp32._replace(bytes=1000 * 509 * 2)
    int8 = ExactConfig(tier=Tier.torch)  # codes of 512 bytes, and 12 beside them
    if probe().right:
        assert least_work(int8, "exact", *shape) == Work(1000 * (512 + 12), operations, True)
        # Most rows are wanted: fp32, whatever the tier.
        assert least_work(int8, "exact", 1000, 509, 7, 251) == fp32


def test_shares_are_work_over_time_and_rate() -> None:
    rates = Rates(read=100.0, fp32=1000.0, int8=None)
    share = share_of(Work(bytes=50.0, operations=4000.0, int8=False), 2.0, rates)
    assert (share.read, share.arithmetic) == (0.25, 2.0)
    assert share_of(Work(50.0, 4000.0, int8=True), 2.0, rates).arithmetic is None


def test_every_reading_counts_and_the_median_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "READ_BYTES", 1 << 12)
    monkeypatch.setattr(limits, "SHAPE", (64, 32, 16))
    found = Limits()
    assert found.median() is None
    found.measure()
    rates = found.median()
    assert rates is not None
    assert math.isfinite(rates.read) and rates.read > 0 and rates.fp32 > 0
    assert (rates.int8 is not None) == probe().right
    found._readings = [Rates(1, 5, None), Rates(9, 4, 7), Rates(2, 6, None)]
    assert found.median() == Rates(2, 5, 7)


def test_numpy_takes_part_where_it_has_as_many_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OPENBLAS_NUM_THREADS", raising=False)
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    assert limits.numpy_threads() == 3
    monkeypatch.setenv("OPENBLAS_NUM_THREADS", "2")
    assert limits.numpy_threads() == 2
    for name in ("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS"):
        monkeypatch.delenv(name, raising=False)
    assert limits.numpy_threads() >= 1
    assert torch.get_num_threads() >= 1
