from __future__ import annotations

from pathlib import Path

import faiss
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.retrieval.reference import assert_equal_up_to_ties, brute_force
from twotower.config import Metric
from twotower.distributed import num_threads
from twotower.retrieval.exact import ExactConfig, ExactIndex, RowMemory
from twotower.retrieval.index import AnyFloatArray, IdArray, SearchResult, unit_rows
from twotower.retrieval.scan import reference_scan
from twotower.retrieval.scan.tiers import Tier
from twotower.settings import ConfigError

REFERENCE = Tier.reference  # the other tiers: test_certified.py


def rows_of(kind: str, count: int, dim: int) -> AnyFloatArray:
    rng = np.random.default_rng(count * 1000 + dim)
    rows = rng.standard_normal((count, dim)).astype(np.float32)
    if kind == "duplicated" and count:
        rows = rows[rng.integers(0, min(5, count), count)]
    if kind == "zeros":
        rows[::2] = 0
    if kind == "tiny":
        rows *= np.float32(10) ** rng.integers(-44, 0, (count, 1)).astype(np.float32)
    if kind == "huge":
        rows *= np.float32(10) ** rng.integers(-10, 30, (count, 1)).astype(np.float32)
    if kind == "constant":
        rows[:] = 1
    if kind == "one_hot" and count:
        rows = np.eye(dim, dtype=np.float32)[rng.integers(0, dim, count)]
    return rows


def make(
    rows: AnyFloatArray, ids: IdArray | None = None, normalized: bool = False, **settings: object
) -> ExactIndex:
    """An index of rows, added in two parts."""
    index = ExactIndex(ExactConfig(**{"tier": REFERENCE, **settings}), rows.shape[1])  # type: ignore[arg-type]
    cut = len(rows) // 3
    index.add(rows[:cut], None if ids is None else ids[:cut], normalized=normalized)
    index.add(rows[cut:], None if ids is None else ids[cut:], normalized=normalized)
    return index


def assert_same(one: SearchResult, other: SearchResult) -> None:
    np.testing.assert_array_equal(one.ids, other.ids)
    np.testing.assert_array_equal(one.scores, other.scores)


KINDS = ["random", "duplicated", "zeros", "tiny", "huge", "constant", "one_hot"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("count", "dim", "num_queries"),
    [(0, 5, 3), (1, 1, 2), (63, 7, 4), (700, 33, 50), (129, 100, 0)],
)
def test_equals_brute_force(kind: str, count: int, dim: int, num_queries: int) -> None:
    rng = np.random.default_rng(7)
    rows, ids = rows_of(kind, count, dim), rng.permutation(3 * count)[:count]
    queries = rng.standard_normal((num_queries, dim)).astype(np.float32)
    queries[1:2] = 0
    unit = unit_rows(rows)
    for k in {1, 10, max(count, 1), count + 3}:
        cosine = make(rows, ids).search(queries, k)
        assert_same(cosine, brute_force(unit, ids, queries, k, Metric.cosine))
        product = make(rows, ids, metric=Metric.ip).search(queries, k)
        assert_equal_up_to_ties(product, rows, ids, queries)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_equals_brute_force_where_many_scores_are_equal(data: st.DataObject) -> None:
    dim = data.draw(st.integers(1, 6))
    count = data.draw(st.integers(1, 80))
    values = st.lists(st.integers(-2, 2), min_size=count * dim, max_size=count * dim)
    rows = np.array(data.draw(values), np.float32).reshape(count, dim)
    queries = np.array(
        data.draw(st.lists(st.integers(-2, 2), min_size=dim, max_size=dim)), np.float32
    )[None]
    k, block_rows = data.draw(st.integers(1, count + 1)), data.draw(st.integers(1, 90))
    found = make(rows, metric=Metric.ip, block_rows=block_rows).search(queries, k)
    # Small integers: every score is exact, so ids are decided by id alone.
    assert_same(found, brute_force(rows, np.arange(count), queries, k, Metric.ip))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("metric", list(Metric))
def test_does_not_depend_on_blocks_threads_batch_or_when_candidates_are_ranked(
    kind: str, metric: Metric, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = rows_of(kind, 500, 24)
    queries = np.random.default_rng(1).standard_normal((12, 24)).astype(np.float32)
    queries *= np.float32(10) ** np.linspace(-38, 30, 12, dtype=np.float32)[:, None]
    want = make(rows, metric=metric, tier=Tier.auto).search(queries, 9)
    for block_rows, threads in ((7, 1), (64, 2), (300, 1), (10**6, 2)):
        with num_threads(threads):
            assert_same(make(rows, metric=metric, block_rows=block_rows).search(queries, 9), want)
    index = make(rows, metric=metric, block_rows=100)
    monkeypatch.setattr(reference_scan, "QUERY_BLOCK", 3)
    assert_same(index.search(queries, 9), want)
    singles = [index.search(query[None], 9) for query in queries]
    assert_same(SearchResult(*map(np.concatenate, zip(*singles, strict=True))), want)
    monkeypatch.setattr(reference_scan, "PENDING", -(10**9))  # re-rank after every block
    assert_same(index.search(queries, 9), want)


@pytest.mark.parametrize("metric", list(Metric))
def test_equals_faiss_flat_up_to_ties(metric: Metric) -> None:
    rng = np.random.default_rng(3)
    rows, queries = (rng.standard_normal((n, 48)).astype(np.float32) for n in (900, 30))
    rows[100:200] = rows[:100]
    used = rows if metric is Metric.ip else unit_rows(rows)
    used_queries = queries if metric is Metric.ip else unit_rows(queries)
    flat = faiss.IndexFlatIP(48)
    flat.add(used)
    theirs = SearchResult(*flat.search(used_queries, 25))
    ours = make(rows, metric=metric).search(queries, 25)
    for result in (ours, theirs):
        assert_equal_up_to_ties(result, used, np.arange(900), used_queries)
    np.testing.assert_allclose(ours.scores, theirs.scores, rtol=0, atol=1e-6 * 48)


def test_rows_of_a_store_are_used_as_rounded(tmp_path: Path) -> None:
    rng = np.random.default_rng(4)
    rounded = unit_rows(rng.standard_normal((300, 40))).astype(np.float16)
    queries = rng.standard_normal((6, 40)).astype(np.float32)
    np.save(tmp_path / "rows.npy", rounded)
    mapped = np.load(tmp_path / "rows.npy", mmap_mode="r")
    want = brute_force(rounded, np.arange(300), queries, 20, Metric.cosine)
    in_memory = make(mapped, normalized=True)
    on_disk = make(mapped, normalized=True, memory=RowMemory.stored)
    assert_same(in_memory.search(queries, 20), want)
    assert_same(on_disk.search(queries, 20), want)
    assert not np.array_equal(make(mapped).search(queries, 20).scores, want.scores)
    # 40 values of two bytes, an fp64 norm and an int64 id a row: nothing was widened.
    assert on_disk.nbytes == 300 * (40 * 2 + 8 + 8)
    assert in_memory.nbytes == 300 * (40 * 4 + 8 + 8)


@pytest.mark.parametrize("memory", list(RowMemory))
@pytest.mark.parametrize("metric", list(Metric))
def test_the_caller_may_go_on_writing_into_his_arrays(memory: RowMemory, metric: Metric) -> None:
    rows, ids = rows_of("random", 50, 8), np.arange(50)
    index = make(rows, ids, normalized=True, memory=memory, metric=metric)
    queries = rows[:5].copy()
    want = index.search(queries, 3)
    rows[:] = 0
    ids[:] = 0
    assert_same(index.search(queries, 3), want)


def test_a_reduced_precision_of_torch_does_not_reach_the_scores() -> None:
    rows, queries = rows_of("random", 500, 64), rows_of("random", 20, 64)
    want = make(rows).search(queries, 10)
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("medium")
        assert_same(make(rows).search(queries, 10), want)
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision(before)


def test_very_long_and_very_short_rows_and_queries() -> None:
    rows = np.array([[1e-40, 0], [2e-40, 0], [3e37, 0], [0, 3e37]], np.float32)
    index = make(rows, metric=Metric.ip)
    for length in (1e-44, 1e-30, 1, 1e30):
        query = np.array([[length, 0]], np.float32)
        assert index.search(query, 4).ids.tolist() == [[2, 1, 0, 3]]
    overflowing = index.search(np.array([[1e30, 1e29]], np.float32), 2)
    assert overflowing.ids.tolist() == [[2, 3]]
    assert np.isposinf(overflowing.scores).all()
    with pytest.raises(ConfigError, match="row 1 has norm 1.41e\\+38, beyond 1e38"):
        index.add(np.array([[1, 1], [1e38, 1e38]], np.float32))
    assert len(index) == 4


def test_exact_scores_by_id() -> None:
    rows, ids = rows_of("random", 20, 6), np.arange(20)[::-1] * 3
    queries = rows_of("random", 2, 6)
    asked = np.array([[3, 0, -1], [57, 57, 6]])
    scores, ties = make(rows, ids, metric=Metric.ip).score(queries, asked)
    for query in range(2):
        for column, row_id in enumerate(asked[query]):
            if row_id == -1:
                assert (scores[query, column], ties[query, column]) == (-np.inf, 0)
                continue
            row = rows[19 - row_id // 3].astype(np.float64)
            np.testing.assert_allclose(scores[query, column], row @ queries[query], rtol=1e-12)
            tie = 1e-6 * np.linalg.norm(row) * np.linalg.norm(queries[query].astype(np.float64))
            np.testing.assert_allclose(ties[query, column], tie, rtol=1e-12)
    with pytest.raises(ConfigError, match="not in the index"):
        make(rows, ids).score(queries, np.array([[1], [0]]))
    with pytest.raises(ConfigError, match="not in the index"):
        make(rows, ids).score(queries, np.array([[100], [0]]))
