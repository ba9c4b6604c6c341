from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from tests.retrieval.reference import brute_force
from tests.retrieval.written import clustered_rows
from twotower.config import Metric
from twotower.retrieval import INDEXES
from twotower.retrieval.faiss_index import FaissConfig, import_faiss
from twotower.retrieval.index import AnyFloatArray
from twotower.retrieval.rerank import RerankedIndex
from twotower.retrieval.saved import load_index, save_index
from twotower.settings import ConfigError


def reranked(rows: AnyFloatArray, factory: str, factor: float) -> RerankedIndex:
    index = INDEXES.build(FaissConfig(factory=factory, rerank=factor), rows.shape[1])
    assert isinstance(index, RerankedIndex)
    index.add(rows, normalized=True)
    return index


@pytest.mark.parametrize("factory", ["PQ4x4", "IVF4,PQ4x4", "RaBitQ", "HNSW8", "PQ4x4fs"])
def test_where_all_rows_are_candidates_the_answer_is_exact(factory: str) -> None:
    rows, queries = clustered_rows(400), clustered_rows(12, seed=3)
    index = reranked(rows, factory, 80)
    if factory.startswith("IVF"):
        index.inner._index.nprobe = 4  # type: ignore[attr-defined]
    elif factory.startswith("HNSW"):
        import_faiss().ParameterSpace().set_index_parameter(
            index.inner._index,  # type: ignore[attr-defined]
            "efSearch",
            400,
        )
    found = index.search(queries, 5)
    want = brute_force(rows, np.arange(400), queries, 5, Metric.cosine)
    np.testing.assert_array_equal(found.ids, want.ids)
    np.testing.assert_array_equal(found.scores, want.scores)


def test_more_candidates_give_a_better_answer() -> None:
    rows, queries = clustered_rows(400), clustered_rows(40, seed=3)
    want = brute_force(rows, np.arange(400), queries, 5, Metric.cosine).ids

    def hits(factor: float) -> int:
        found = reranked(rows, "PQ2x4", factor).search(queries, 5).ids
        return sum(len(np.intersect1d(one, other)) for one, other in zip(found, want, strict=True))

    assert hits(1) < hits(4) < hits(40)


def test_it_is_not_searched_without_its_rows(tmp_path: Path) -> None:
    rows = clustered_rows(90)
    index = reranked(rows, "SQ8", 2)
    save_index(index, tmp_path)
    loaded = load_index(tmp_path)
    assert isinstance(loaded, RerankedIndex)
    for use in (
        lambda: loaded.search(rows[:2], 3),
        lambda: loaded.add(rows[:1]),
        lambda: loaded.delete(np.array([1])),
    ):
        with pytest.raises(ConfigError, match="open it with its store, or give it rows"):
            use()
    with pytest.raises(ConfigError, match="holds 90 rows, and 89 are to re-rank them"):
        loaded.attach([rows[:89]], np.arange(89))
    loaded.attach([rows[:50], rows[50:]], np.arange(90), normalized=True)
    np.testing.assert_array_equal(loaded.search(rows, 3).ids, index.search(rows, 3).ids)
