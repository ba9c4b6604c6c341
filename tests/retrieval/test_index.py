"""What every index must do, whatever is inside."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest

from tests.retrieval.reference import brute_force
from twotower.config import IndexConfig, Metric
from twotower.retrieval import INDEXES
from twotower.retrieval.exact import ExactConfig, RowMemory
from twotower.retrieval.faiss_index import FaissConfig
from twotower.retrieval.index import AnyFloatArray, IdArray, VectorIndex, unit_rows
from twotower.retrieval.rerank import RerankedIndex
from twotower.retrieval.saved import load_index, save_index
from twotower.retrieval.scan.tiers import Tier
from twotower.settings import ConfigError

DIM = 12

KINDS = [name for name in INDEXES if name != "auto"]  # which becomes one of the others
CASES: dict[str, IndexConfig] = {name: INDEXES.config_class(name)() for name in KINDS}  # type: ignore[misc]
CASES["exact stored"] = ExactConfig(memory=RowMemory.stored, block_rows=10)
CASES["exact reference"] = ExactConfig(tier=Tier.reference)
CASES["exact fp16"] = ExactConfig(memory=RowMemory.fp16)
CASES["exact ip"] = ExactConfig(metric=Metric.ip)
CASES["faiss ip"] = FaissConfig(metric=Metric.ip)
CASES["faiss rerank"] = FaissConfig(rerank=1.5)
CASES["faiss rerank ip"] = FaissConfig(rerank=2, metric=Metric.ip)
CASES["SQ8 rerank"] = FaissConfig(factory="SQ8", rerank=3)
FACTORIES = (
    *("HNSW16", "HNSW16_SQ8", "IVF4,Flat", "IVF4_HNSW4,SQ8", "SQ8", "PCA8,Flat", "PCA8,IVF4,Flat"),
    *("IDMap,Flat", "IVF4,PQ3x4", "OPQ3_6,IVF4,PQ3x4", "OPQ3,PQ3x4,Refine(SQfp16)"),
    *("IVF4,PQ3x4,RFlat", "RaBitQ", "IVF4,RaBitQ"),
)
for factory in FACTORIES:
    CASES[factory] = FaissConfig(factory=factory)
EXACT = [name for name in CASES if name.startswith("exact") or name.startswith("faiss")]
# FAISS says so.
CANNOT_DELETE = [name for name in CASES if "HNSW16" in name or "RFlat" in name or "Refine" in name]


def rows_and_queries() -> tuple[AnyFloatArray, AnyFloatArray]:
    rng = np.random.default_rng(0)
    rows = rng.standard_normal((90, DIM)).astype(np.float32)
    return rows, rng.standard_normal((5, DIM)).astype(np.float32)


def loaded(
    folder: Path, rows: AnyFloatArray, ids: IdArray, fingerprint: str | None = None
) -> VectorIndex:
    """The index that is saved in a folder, with its rows if it needs them."""
    index = load_index(folder, fingerprint)
    if isinstance(index, RerankedIndex):
        index.attach([rows[:40], rows[40:]], ids)
    return index


def as_kept(config: IndexConfig, rows: AnyFloatArray) -> AnyFloatArray:
    """What the index searches when `rows` are added."""
    kept = unit_rows(rows) if config.metric is Metric.cosine else rows
    half = isinstance(config, ExactConfig) and config.memory is RowMemory.fp16
    return kept.astype(np.float16) if half else kept


@pytest.mark.parametrize("name", CASES)
def test_an_empty_index_answers_with_padding(name: str) -> None:
    index = INDEXES.build(CASES[name], DIM)
    assert (len(index), index.dim, index.config) == (0, DIM, CASES[name])
    found = index.search(rows_and_queries()[1], 3)
    assert found.ids.tolist() == [[-1] * 3] * 5
    assert np.isneginf(found.scores).all()
    index.add(np.empty((0, DIM), np.float32))
    assert len(index) == 0


@pytest.mark.parametrize("name", CASES)
def test_adds_searches_and_keeps_ids(name: str) -> None:
    rows, queries = rows_and_queries()
    index = INDEXES.build(CASES[name], DIM)
    ids = np.random.default_rng(1).permutation(1000)[:60]
    index.add(rows[:60], ids)
    assert set(index.search(queries, 60).ids.ravel().tolist()) <= {*ids.tolist(), -1}
    index.add(rows[60:])  # the next ids
    every = np.concatenate([ids, np.arange(30) + ids.max() + 1])
    assert len(index) == 90
    found = index.search(queries, 10)
    assert (found.scores.dtype, found.ids.dtype) == (np.float32, np.int64)
    assert found.scores.shape == found.ids.shape == (5, 10)
    if name in EXACT:
        want = brute_force(as_kept(index.config, rows), every, queries, 10, index.config.metric)
        np.testing.assert_array_equal(found.ids, want.ids)
        np.testing.assert_allclose(found.scores, want.scores, atol=1e-5)
    for scores, hits in zip(*found, strict=True):
        real = hits[hits != -1]
        assert len(set(real.tolist())) == len(real)
        assert (hits[len(real) :] == -1).all()
        assert (np.diff(scores[: len(real)]) <= 0).all()
        assert np.isneginf(scores[len(real) :]).all()


@pytest.mark.parametrize("name", CASES)
def test_deletes_rows_and_keeps_the_ids_of_the_others(name: str, tmp_path: Path) -> None:
    rows, queries = rows_and_queries()
    index = INDEXES.build(CASES[name], DIM)
    index.add(rows, np.arange(90)[::-1] * 2)
    if name in CANNOT_DELETE:
        with pytest.raises(ConfigError, match="cannot delete"):
            index.delete(np.array([2]))
        assert len(index) == 90
        return
    index.delete(np.arange(0, 90, 2))
    left = np.arange(90)[::-1] * 2
    there = ~np.isin(left, np.arange(0, 90, 2))
    assert len(index) == there.sum() == 45
    for bad, words in (([4], "4 is not in"), ([90, -1], "-1 is not in"), ([90, 90], "90 cannot")):
        with pytest.raises(ConfigError, match=f"row id {words}"):
            index.delete(np.array(bad))
    index.add(rows[there][:1], np.array([4]))  # a free id again
    index.add(rows[:1])  # not what has been given before
    save_index(index, tmp_path)
    left = np.concatenate([left[there], [4, 179]])
    rows = np.concatenate([rows[there], rows[there][:1], rows[:1]])
    for searched in (index, loaded(tmp_path, rows, left)):
        assert len(searched) == 47
        found = searched.search(queries, 60)
        assert set(found.ids.ravel().tolist()) <= {*left.tolist(), -1}
        if name in EXACT:
            want = brute_force(as_kept(index.config, rows), left, queries, 60, index.config.metric)
            np.testing.assert_array_equal(found.ids, want.ids)
    if name in EXACT:
        index.delete(left)
        assert len(index) == 0
        assert (index.search(queries, 2).ids == -1).all()


@pytest.mark.parametrize("name", CASES)
def test_pads_beyond_its_rows_and_takes_no_queries(name: str) -> None:
    rows, queries = rows_and_queries()
    index = INDEXES.build(CASES[name], DIM)
    index.add(rows)
    found = index.search(queries, 100)
    assert (found.ids[:, 90:] == -1).all()
    assert np.isneginf(found.scores[:, 90:]).all()
    if name in EXACT:
        assert (np.sort(found.ids[:, :90], axis=1) == np.arange(90)).all()
    assert index.search(queries[:0], 4).ids.shape == (0, 4)


@pytest.mark.parametrize("name", EXACT)
def test_equal_scores_stand_in_order_of_id(name: str) -> None:
    rows = np.tile(rows_and_queries()[0][:3], (4, 1))
    index = INDEXES.build(CASES[name], DIM)
    index.add(rows, np.arange(12)[::-1].copy())
    found = index.search(rows[:3], 12)
    for scores, ids in zip(*found, strict=True):
        for score in np.unique(scores):
            assert (np.diff(ids[scores == score]) > 0).all()


@pytest.mark.parametrize("name", CASES)
def test_zero_rows_score_zero(name: str) -> None:
    rows, queries = rows_and_queries()
    rows[7] = 0
    index = INDEXES.build(CASES[name], DIM)
    index.add(rows)
    found = index.search(queries, 90)
    if name in EXACT:
        assert (found.scores[found.ids == 7] == 0).all()
    assert np.isfinite(found.scores[found.ids != -1]).all()


@pytest.mark.parametrize("name", CASES)
def test_saved_and_loaded_it_answers_the_same(name: str, tmp_path: Path) -> None:
    rows, queries = rows_and_queries()
    index = INDEXES.build(CASES[name], DIM)
    index.add(rows[:50], np.arange(50)[::-1] * 7)
    index.add(rows[50:])
    save_index(index, tmp_path / "index", "rows of a store")
    ids = np.concatenate([np.arange(50)[::-1] * 7, 49 * 7 + 1 + np.arange(40)])
    again = loaded(tmp_path / "index", rows, ids, "rows of a store")
    assert (len(again), again.dim, again.config) == (90, DIM, CASES[name])
    for one, other in zip(index.search(queries, 20), again.search(queries, 20), strict=True):
        np.testing.assert_array_equal(one, other)
    with pytest.raises(ConfigError, match="was built from other rows or with other settings"):
        load_index(tmp_path / "index", "others")
    # Ids are known again: the next is free, the old ones are taken.
    with pytest.raises(ConfigError, match="row id 7 is taken"):
        again.add(rows[:1], np.array([7]))
    if not {"PQ", "RaBitQ"} & set(re.findall("PQ|RaBitQ", name)):
        again.add(rows[:1] * 2)
        assert again.search(rows[:1], 91).ids.max() == 49 * 7 + 41


@pytest.mark.parametrize("name", CASES)
def test_refuses_what_it_cannot_answer(name: str) -> None:
    rows, queries = rows_and_queries()
    index = INDEXES.build(CASES[name], DIM)
    index.add(rows)
    for bad in (np.nan, np.inf, -np.inf):
        broken = rows.copy()
        broken[41, 3] = bad
        with pytest.raises(ConfigError, match="row 41 holds NaN or infinity"):
            index.add(broken)
        with pytest.raises(ConfigError, match="query 41 holds NaN or infinity"):
            index.search(broken, 1)
    with pytest.raises(ConfigError, match="row 0 holds NaN or infinity"):
        index.add(np.full((1, DIM), 1e300))
    with pytest.raises(ConfigError, match="shape \\(90, 11\\).* dimension 12"):
        index.add(rows[:, 1:])
    with pytest.raises(ConfigError, match="shape \\(12,\\).* dimension 12"):
        index.search(queries[0], 1)
    with pytest.raises(ConfigError, match="floating-point numbers, not int64"):
        index.search(np.ones((1, DIM), np.int64), 1)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="k must be at least 1, not 0"):
        index.search(queries, 0)
    with pytest.raises(ConfigError, match="row id 3 is taken"):
        index.add(rows[:2], np.array([200, 3]))
    with pytest.raises(ConfigError, match="row id 200 is taken"):
        index.add(rows[:2], np.array([200, 200]))
    with pytest.raises(ConfigError, match="must not be negative, but one is -1"):
        index.add(rows[:2], np.array([200, -1]))
    with pytest.raises(ConfigError, match="2 rows cannot have ids of shape \\(3,\\)"):
        index.add(rows[:2], np.arange(3) + 200)
    assert len(index) == 90
