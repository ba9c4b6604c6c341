"""Searches of selected rows against a brute force over those rows."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from tests.helpers import tiny_bundle
from tests.retrieval.reference import brute_force
from tests.retrieval.written import clustered_rows, write_store
from twotower.config import Metric
from twotower.embedding.encoder import Encoder
from twotower.embedding.store import EmbeddingStore
from twotower.retrieval.build import build_index
from twotower.retrieval.exact import ExactConfig
from twotower.retrieval.faiss_index import FaissConfig
from twotower.retrieval.index import AnyFloatArray, IdArray, SearchResult
from twotower.retrieval.search import collection as module
from twotower.retrieval.search.collection import Collection, among, merge
from twotower.retrieval.search.searcher import Options, Searcher
from twotower.settings import ConfigError

COUNT, DIM = 20_000, 12
ROWS = clustered_rows(COUNT)
# Half of the rows, a hundredth, two rows; and those of a part of the space, the hardest to fetch.
SHARES = {
    "half": np.arange(COUNT) % 2 == 0,
    "percent": np.arange(COUNT) % 100 == 7,
    "two": np.isin(np.arange(COUNT), [4, 19_999]),
    "apart": ROWS[:, 0] > 0.3,
    "none": np.zeros(COUNT, bool),
}


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> EmbeddingStore:
    columns = {name: mask for name, mask in SHARES.items()}
    columns["number"] = np.arange(COUNT)
    return write_store(tmp_path_factory.mktemp("store"), ROWS, columns, shard_rows=3000)


def queries(count: int = 5) -> AnyFloatArray:
    rng = np.random.default_rng(1)
    made = rng.standard_normal((count, DIM)).astype(np.float32)
    made[0] = ROWS[np.argmin(ROWS[:, 0])]  # far from the rows apart
    return made


@pytest.mark.parametrize(("few", "most"), [(20_000, 4096), (0, 4096), (0, 0)])
@pytest.mark.parametrize("name", SHARES)
@pytest.mark.parametrize("k", [1, 150])
def test_selected_rows_give_k_results_equal_to_brute_force_on_them(
    name: str, k: int, few: int, most: int, store: EmbeddingStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "FEW_ROWS", few)
    monkeypatch.setattr(module, "MOST_FETCHED", most)
    monkeypatch.setattr(module, "BLOCK_ROWS", 1000)
    collection = Collection(store, build_index(ExactConfig(), store))
    ids = collection.passing(name)
    np.testing.assert_array_equal(ids, np.flatnonzero(SHARES[name]))
    found = collection.search(queries(), k, ids)
    want = brute_force(ROWS[ids], ids, queries(), k, Metric.cosine)
    np.testing.assert_array_equal(found.ids, want.ids)
    np.testing.assert_allclose(found.scores, want.scores, atol=1e-6)
    assert ((found.ids != -1).sum(axis=1) == min(k, len(ids))).all()


def test_an_approximate_index_gives_k_selected_rows_too(
    store: EmbeddingStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "FEW_ROWS", 0)
    config = FaissConfig(factory="IVF16,Flat", nprobe=1)
    collection = Collection(store, build_index(config, store))
    for name in ("half", "apart"):
        ids = np.flatnonzero(SHARES[name])
        found = collection.search(queries(), 20, ids)
        assert (found.ids != -1).all()
        assert among(found.ids, ids).all()
        assert (np.diff(found.scores, axis=1) <= 0).all()


def test_the_inner_product_ranks_selected_rows_by_itself(store: EmbeddingStore) -> None:
    collection = Collection(store, build_index(ExactConfig(metric=Metric.ip), store))
    ids = collection.passing("percent and number > 5000")
    np.testing.assert_array_equal(ids, np.arange(5007, COUNT, 100))
    found = collection.search(queries() * 3, 10, ids)
    want = brute_force(ROWS[ids], ids, queries() * 3, 10, Metric.ip)
    np.testing.assert_array_equal(found.ids, want.ids)


@pytest.mark.parametrize("few", [0, 20_000])
def test_rows_that_were_deleted_pass_no_filter(
    few: int, store: EmbeddingStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "FEW_ROWS", few)
    collection = Collection(store, build_index(ExactConfig(), store))
    collection.passing("percent")  # remembered
    gone = np.arange(7, COUNT, 300)
    collection.delete(gone)
    collection.delete(np.array([8]))
    left = np.setdiff1d(np.flatnonzero(SHARES["percent"]), gone)
    selected = collection.passing("percent")
    np.testing.assert_array_equal(selected, left)
    found = collection.search(queries(), 20, selected)
    want = brute_force(ROWS[left], left, queries(), 20, Metric.cosine)
    np.testing.assert_array_equal(found.ids, want.ids)
    assert len(collection) == COUNT - len(gone) - 1


def test_merged_results_go_by_score_then_source_then_id() -> None:
    def result(*pairs: tuple[float, int]) -> SearchResult:
        scores, ids = zip(*pairs, strict=True)
        return SearchResult(np.array([scores], np.float32), np.array([ids], np.int64))

    inf = -np.inf
    found, source = merge(
        [result((3, 9), (1, 4), (inf, -1)), result((3, 2), (3, 8), (1, 1)), result((inf, -1))], 6
    )
    assert found.ids.tolist() == [[9, 2, 8, 4, 1, -1]]
    assert source[0, :5].tolist() == [0, 1, 1, 0, 1]


def greedy(ids: IdArray, cosine: float, k: int) -> list[int]:
    """Of hits in order, the first k that are not near one that was kept."""
    kept: list[int] = []
    for row in ids.tolist():
        wide = ROWS[kept].astype(np.float64) @ ROWS[row].astype(np.float64)
        if not (wide >= cosine).any():
            kept.append(row)
        if len(kept) == k:
            break
    return kept


@pytest.mark.parametrize(
    ("text", "cosine"), [("", 0.94), ("", 0.7), ("half", 0.94), ("percent", 0.3)]
)
def test_near_duplicates_leave_k_distinct_results(
    text: str, cosine: float, store: EmbeddingStore
) -> None:
    searcher = Searcher(
        Encoder(tiny_bundle()), Collection(store, build_index(ExactConfig(), store))
    )
    options = Options(k=20, filter=text, duplicates=cosine)
    every = np.flatnonzero(SHARES[text]) if text else np.arange(COUNT)
    for query, hits in zip(queries(3), searcher.search_vectors(queries(3), options), strict=True):
        ranked = brute_force(ROWS[every], every, query[None], len(every), Metric.cosine).ids[0]
        want = greedy(ranked, cosine, 20)
        assert [hit.row_id for hit in hits] == want
        assert [hit.rank for hit in hits] == list(range(1, len(want) + 1))
        assert len(want) == 20 or cosine < 0.5
    threshold = hits[3].score
    cut = Options(k=20, filter=text, duplicates=cosine, threshold=threshold)
    assert searcher.search_vectors(query[None], cut) == [hits[:4]]


def test_a_filter_of_few_rows_is_told_and_a_wrong_one_refused(
    store: EmbeddingStore, caplog: pytest.LogCaptureFixture
) -> None:
    searcher = Searcher(
        Encoder(tiny_bundle()), Collection(store, build_index(ExactConfig(), store))
    )
    hits = searcher.search(["a dog"], Options(k=10, filter="number in [3, 5]"))[0]
    assert {(hit.row_id, hit.path) for hit in hits} == {
        (3, Path("/pictures/3.jpg")),
        (5, Path("/pictures/5.jpg")),
    }
    assert caplog.messages == ["only 2 rows pass the filter number in [3, 5]"]
    assert searcher.search(["a dog"], Options(k=10, filter="none")) == [[]]
    assert caplog.messages[1:] == ["no row passes the filter none"]
    with pytest.raises(ConfigError, match="the column size, but the store has image_path, caption"):
        searcher.search(["a dog"], Options(filter="size>3"))
