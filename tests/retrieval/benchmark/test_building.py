from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from tests.retrieval.benchmark.helpers import ArrayData, some_rows
from twotower.config import Metric
from twotower.engine_config import Engine
from twotower.retrieval.benchmark import building
from twotower.retrieval.benchmark.building import (
    build,
    build_all,
    bytes_a_value,
    index_config,
    touch,
)
from twotower.retrieval.exact import ExactConfig, RowMemory
from twotower.retrieval.faiss_index import FaissConfig
from twotower.retrieval.index import AnyFloatArray
from twotower.retrieval.scan.tiers import Tier
from twotower.settings import ConfigError


def test_names_become_configs_of_the_metric_that_is_asked_for() -> None:
    like = ExactConfig(metric=Metric.ip, block_rows=99)
    assert index_config("exact", like) is like
    assert index_config("exact:reference", like) == replace(like, tier=Tier.reference)
    assert index_config("HNSW8", like) == FaissConfig(factory="HNSW8", metric=Metric.ip)
    assert index_config("exact", FaissConfig(metric=Metric.ip)) == ExactConfig(metric=Metric.ip)
    with pytest.raises(ConfigError, match="has exact:fast, but the tiers of exact are auto, nat"):
        index_config("exact:fast", like)
    for name in ("exact", "HNSW8"):
        with pytest.raises(ConfigError, match=r"in this process; leave out index\.engine=ray"):
            index_config(name, ExactConfig(engine=Engine.ray))


def test_an_index_that_cannot_be_built_has_its_reason_and_the_exact_one_is_built_once() -> None:
    data = ArrayData(some_rows(20))
    exact, built, notes = build_all(["Flat", "IVF64,Flat", "exact"], ExactConfig(), data, seed=1)
    assert list(built) == ["Flat", "exact"]
    assert built["exact"].index is exact
    assert len(exact) == len(built["Flat"].index) == 20
    assert built["Flat"].nbytes >= 20 * 16 * 4
    assert built["Flat"].seconds > 0
    with pytest.raises(ConfigError, match="has exact:fast"):
        build_all(["Flat", "exact:fast"], ExactConfig(), data, seed=1)
    assert "needs at least 64 rows to train on" in notes["IVF64,Flat"]


def test_rows_are_read_from_the_disk_before_the_clock_starts(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    np.save(tmp_path / "rows.npy", some_rows(20).astype(np.float16))
    data = ArrayData(np.load(tmp_path / "rows.npy", mmap_mode="r"))
    done: list[str] = []

    def touched(rows: AnyFloatArray) -> None:
        touch(rows)
        done.append(f"touched {len(rows)}")

    def clock() -> float:
        done.append("clock")
        return 0.0

    monkeypatch.setattr(building, "touch", touched)
    monkeypatch.setattr(building, "time", SimpleNamespace(perf_counter=clock))
    assert len(build(FaissConfig(factory="Flat"), data, seed=1).index) == 20
    assert done == ["touched 7", "clock", "clock", "touched 13", "clock", "clock"]


@pytest.mark.parametrize("rows", [some_rows(9)[:0], some_rows(9)[::2], some_rows(2000)])
def test_any_rows_can_be_touched(rows: AnyFloatArray) -> None:
    before = rows.copy()
    touch(rows)
    np.testing.assert_array_equal(rows, before)


def test_what_does_not_fit_into_memory_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    data = ArrayData(some_rows(60))  # 60 * 16 * 4 bytes as fp32
    monkeypatch.setattr(building, "free_bytes", lambda: 2000)
    _, built, notes = build_all(
        ["exact", "Flat", "SQ8"], ExactConfig(memory=RowMemory.stored), data, seed=1
    )
    assert list(built) == ["exact", "SQ8"]
    assert "Flat would need about 0.0 GB for 60 rows, but 0.0 GB are free; all" in notes["Flat"]
    with pytest.raises(ConfigError, match="exact would need about"):
        build_all(["SQ8"], ExactConfig(), data, seed=1)
    sizes = {"PQ8": 0.5, "OPQ8,IVF4,PQ8x4fsr,RFlat": 4, "SQfp16": 2, "HNSW8,SQ8": 1, "IVF4,Flat": 4}
    for factory, size in sizes.items():
        assert bytes_a_value(FaissConfig(factory=factory)) == size
