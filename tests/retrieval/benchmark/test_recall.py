from __future__ import annotations

import numpy as np
import pytest

from tests.retrieval.benchmark.helpers import some_rows
from twotower.config import Metric
from twotower.retrieval.auto.recall import shares_found, without_own
from twotower.retrieval.benchmark.data import Queries
from twotower.retrieval.benchmark.recall import Truth
from twotower.retrieval.build import build_index
from twotower.retrieval.exact import ExactConfig, ExactIndex
from twotower.retrieval.faiss_index import FaissConfig
from twotower.retrieval.index import IdArray, SearchResult


@pytest.mark.parametrize("metric", list(Metric))
def test_a_row_that_is_as_good_counts_as_found(metric: Metric) -> None:
    rows = np.repeat(some_rows(10), 4, axis=0)  # rows 4 i to 4 i + 3 are the same
    queries = rows[::4] * 3
    index = ExactIndex(ExactConfig(metric=metric), 16)
    index.add(rows)
    best = index.search(queries, 2)
    twins = best.ids // 4 * 4 + (best.ids + 2) % 4
    assert not set(map(tuple, twins)) & set(map(tuple, best.ids))
    assert shares_found(index, queries, twins, best).mean() == 1
    wrong = twins.copy()
    wrong[:, 1] = (wrong[:, 1] + 4) % 40
    padded = twins.copy()
    padded[0, 1] = -1
    assert shares_found(index, queries, padded, best).mean() == pytest.approx(19 / 20)
    assert shares_found(index, queries, wrong, best).mean() == pytest.approx(1 / 2)


def test_ids_that_faiss_did_not_find_are_not_hits() -> None:
    index = ExactIndex(ExactConfig(), 16)
    index.add(some_rows(5))
    nothing: IdArray = np.full((1, 3), -1)
    assert shares_found(index, some_rows(1), nothing, index.search(some_rows(1), 3)).mean() == 0


def test_what_is_not_there_is_not_asked_for() -> None:
    index = ExactIndex(ExactConfig(), 16)
    index.add(some_rows(3))
    best = index.search(some_rows(2, seed=1), 5)
    assert (best.ids == -1).sum() == 4
    assert shares_found(index, some_rows(2, seed=1), best.ids, best).mean() == 1
    lost = best.ids.copy()
    lost[0, 1] = -1
    assert shares_found(index, some_rows(2, seed=1), lost, best).mean() == pytest.approx(5 / 6)


def test_the_query_itself_is_left_out_or_else_the_last() -> None:
    ids = np.array([[7, 1, 2], [3, 7, 4], [5, 6, 8]])
    scores = np.array([[0.9, 0.8, 0.7]] * 3, np.float32)
    found = without_own(SearchResult(scores, ids), np.array([7, 7, 7]))
    np.testing.assert_array_equal(found.ids, [[1, 2], [3, 4], [5, 6]])
    np.testing.assert_allclose(found.scores, [[0.8, 0.7], [0.9, 0.7], [0.9, 0.8]])


@pytest.mark.parametrize("k", [1, 5, 59, 60])
def test_recall_of_rows_as_queries_equals_a_direct_computation(k: int) -> None:
    rows = some_rows(60)
    exact = build_index(ExactConfig(), rows)
    approximate = build_index(FaissConfig(factory="IVF8,Flat", nprobe=2), rows)
    assert isinstance(exact, ExactIndex)
    own = np.arange(0, 60, 3)
    truth = Truth(exact, Queries(rows[own], "rows", own), 15)
    unit = (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float64)
    scores = unit[own[:15]] @ unit.T
    scores[np.arange(15), own[:15]] = -np.inf
    best = np.argsort(-scores, axis=1)[:, : min(k, 59)]
    hits = 0
    for query, wanted in zip(own[:15], best, strict=True):
        found = approximate.search(rows[[query]], k + 1).ids[0].tolist()
        found = [each for each in found if each != query][:k]
        hits += len(set(found) & set(wanted.tolist()))
    assert truth.recall(exact, k) == 1
    assert truth.recall(approximate, k) == pytest.approx(hits / best.size)
    assert hits < best.size
