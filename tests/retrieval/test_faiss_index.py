from __future__ import annotations

import dataclasses
import sys
from pathlib import Path

import numpy as np
import pytest

from tests.retrieval.reference import brute_force
from twotower.config import Metric
from twotower.retrieval.build import build_index
from twotower.retrieval.faiss_index import FaissConfig, FaissIndex
from twotower.retrieval.faiss_parts import searched_with
from twotower.retrieval.index import AnyFloatArray, unit_rows
from twotower.settings import ConfigError


def some_rows(count: int = 200, dim: int = 8) -> AnyFloatArray:
    return np.random.default_rng(5).standard_normal((count, dim)).astype(np.float32)


def refusal(config: FaissConfig, count: int = 30) -> str:
    with pytest.raises(ConfigError) as refused:
        FaissIndex(config, 8).add(some_rows(count))
    return str(refused.value)


def test_says_what_is_wrong_with_a_factory_string() -> None:
    assert refusal(FaissConfig(factory="Flatt")) == (
        "index.factory 'Flatt' cannot be built for dimension 8: could not parse index string Flatt"
    )
    assert "multiple of the number of subquantizers" in refusal(FaissConfig(factory="PQ3"))
    assert "metric == METRIC_L2" in refusal(FaissConfig(factory="LSH"))


@pytest.mark.parametrize(("factory", "needed"), [("IVF64,Flat", 64), ("PQ4", 256)])
def test_too_few_rows_to_train_on_are_named(factory: str, needed: int) -> None:
    assert refusal(FaissConfig(factory=factory)) == (
        f"index.factory '{factory}' needs at least {needed} rows to train on, but there are 30; "
        "choose a smaller number, or Flat"
    )


def test_a_setting_that_the_index_does_not_have_is_refused() -> None:
    assert refusal(FaissConfig(nprobe=4)).startswith("index.factory 'Flat' has no nprobe to set")
    assert "has no efSearch to set" in refusal(FaissConfig(factory="IVF4,Flat", ef_search=4))


def test_without_faiss_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "faiss", None)
    with pytest.raises(ConfigError, match=r"not installed; run: pip install 'twotower\[cpu\]'"):
        FaissIndex(FaissConfig(), 8)


def test_search_settings_reach_faiss() -> None:
    rows, queries = some_rows(), some_rows(20)[:, ::-1].copy()
    want = brute_force(unit_rows(rows), np.arange(200), queries, 10, Metric.cosine).ids

    def found(**settings: object) -> int:
        index = FaissIndex(FaissConfig(**settings), 8)  # type: ignore[arg-type]
        index.add(rows)
        return int((index.search(queries, 10).ids == want).sum())

    assert found(factory="IVF8,Flat", nprobe=8) == want.size
    assert found(factory="IVF8,Flat", nprobe=1) < want.size
    assert found(factory="HNSW16", ef_search=200) == want.size


def test_search_settings_are_set_again_when_it_is_loaded(tmp_path: object) -> None:
    rows = some_rows()
    index = FaissIndex(FaissConfig(factory="IVF8,Flat", nprobe=5), 8)
    index.add(rows)
    index.write(tmp_path / "file")  # type: ignore[operator]
    other = FaissIndex(FaissConfig(factory="IVF8,Flat", nprobe=3), 8)
    other.read(tmp_path / "file")  # type: ignore[operator]
    assert (index._index.nprobe, other._index.nprobe) == (5, 3)


@pytest.mark.parametrize(
    ("factory", "asked", "usual"),
    [
        ("IVF8,Flat", {"nprobe": 5}, {"nprobe": 1}),
        ("HNSW8", {"ef_search": 99}, {"efSearch": 16}),
        ("IVF8_HNSW8,Flat", {"nprobe": 5, "ef_search": 99}, {"nprobe": 1, "efSearch": 16}),
        ("SQ8,RFlat", {"k_factor": 7.0}, {"k_factor_rf": 1}),
    ],
)
def test_a_loaded_index_forgets_the_search_that_it_was_saved_with(
    factory: str, asked: dict[str, float], usual: dict[str, float], tmp_path: Path
) -> None:
    index = FaissIndex(FaissConfig(factory=factory, **asked), 8)  # type: ignore[arg-type]
    index.add(some_rows())
    index.write(tmp_path / "file")
    assert all(searched_with(index.faiss_index)[name] != usual[name] for name in usual)
    other = FaissIndex(FaissConfig(factory=factory), 8)
    other.read(tmp_path / "file")
    assert searched_with(other.faiss_index) == usual
    index.search_with(**dict.fromkeys(asked, 0))
    assert searched_with(index.faiss_index) == usual


def test_refinement_looks_at_more_candidates() -> None:
    rows, queries = some_rows(600), some_rows(20)[:, ::-1].copy()
    want = brute_force(unit_rows(rows), np.arange(600), queries, 10, Metric.cosine).ids

    def found(**settings: object) -> int:
        index = FaissIndex(FaissConfig(factory="PQ4x4,RFlat", **settings), 8)  # type: ignore[arg-type]
        index.add(rows)
        return int((index.search(queries, 10).ids == want).sum())

    assert found() < found(k_factor=60) == want.size
    assert "has no k_factor_rf to set" in refusal(FaissConfig(k_factor=2))
    for name in ("k_factor", "rerank"):
        with pytest.raises(ConfigError, match=f"index.{name} must be 0 or at least 1, not 0.5"):
            FaissConfig(**{name: 0.5})  # type: ignore[arg-type]


MAPPED = ("Flat", "SQ8", "HNSW16", "PQ4", "RaBitQ", "IVF8,Flat", "OPQ4_8,IVF8,PQ4x4", "SQ8,RFlat")


@pytest.mark.parametrize("factory", MAPPED)
def test_a_mapped_index_answers_the_same_and_takes_no_rows(factory: str, tmp_path: Path) -> None:
    rows = some_rows(300)
    config = FaissConfig(factory=factory)
    index = FaissIndex(config, 8)
    index.add(rows)
    index.write(tmp_path / "file")
    mapped = FaissIndex(dataclasses.replace(config, memory_map=True), 8)
    mapped.read(tmp_path / "file")
    for one, other in zip(index.search(rows[:9], 5), mapped.search(rows[:9], 5), strict=True):
        np.testing.assert_array_equal(one, other)
    for change in (lambda: mapped.add(rows[:1]), lambda: mapped.delete(np.array([3]))):
        with pytest.raises(ConfigError, match="opens an index for searching only"):
            change()


def test_says_what_cannot_be_mapped() -> None:
    for factory in ("PQ4x4fs", "IVF4,PQ4x4fsr"):
        said = refusal(FaissConfig(factory=factory, memory_map=True))
        assert "FAISS cannot map FastScan codes" in said


def test_without_a_gpu_it_says_what_to_install() -> None:
    assert "needs FAISS for GPUs and a CUDA device" in refusal(FaissConfig(gpu=True))


def test_few_rows_to_train_on_are_one_line(
    capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    FaissIndex(FaissConfig(factory="OPQ2_4,IVF8,PQ2x4"), 8).add(some_rows(60))
    assert capfd.readouterr().err == ""
    (line,) = caplog.messages
    assert line == (
        "index.factory 'OPQ2_4,IVF8,PQ2x4' learns 16 centroids from 60 rows; FAISS advises 624 or "
        "more"
    )


def test_training_is_decided_by_the_seed() -> None:
    rows = some_rows(400)
    config = FaissConfig(factory="IVF8,Flat", sample_rows=100)

    def centroids(seed: int) -> AnyFloatArray:
        index = build_index(config, rows, seed=seed)
        assert isinstance(index, FaissIndex)
        return np.asarray(index._index.quantizer.reconstruct_n(0, 8))

    np.testing.assert_array_equal(centroids(1), centroids(1))
    assert not np.array_equal(centroids(1), centroids(2))


def test_counts_the_bytes_that_it_holds() -> None:
    index = FaissIndex(FaissConfig(), 8)
    index.add(some_rows(1000))
    # Eight fp32 values and an id a row, and a header.
    assert 0 < index.nbytes - 1000 * (8 * 4 + 8) < 200
