from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.helpers import tiny_bundle
from tests.retrieval.conftest import CAPTIONS, COUNT
from twotower.embedding.encoder import Encoder
from twotower.embedding.store import EmbeddingStore
from twotower.retrieval.build import build_index
from twotower.retrieval.exact import ExactConfig
from twotower.retrieval.faiss_index import FaissConfig
from twotower.retrieval.search.collection import Collection
from twotower.retrieval.search.searcher import Hit, Options, Searcher
from twotower.settings import ConfigError


@pytest.fixture
def searcher(store: EmbeddingStore) -> Searcher:
    return Searcher(Encoder(tiny_bundle()), Collection(store, build_index(ExactConfig(), store)))


def test_finds_what_a_plain_product_finds(searcher: Searcher, store: EmbeddingStore) -> None:
    texts = ["a red square", "日本語", "what's this (black)?"]
    rows = np.concatenate(store.image_shards()).astype(np.float64)
    scores = searcher.encoder.encode_texts(texts).astype(np.float64) @ rows.T
    for hits, want in zip(searcher.search_texts(texts, 6), scores, strict=True):
        order = np.argsort(-want)[:6]
        assert [hit.row_id for hit in hits] == store.row_ids()[order].tolist()
        assert [hit.rank for hit in hits] == [1, 2, 3, 4, 5, 6]
        np.testing.assert_allclose([hit.score for hit in hits], want[order], atol=1e-6)
        for hit in hits:
            assert hit.path.name.startswith(f"{hit.row_id:04d}_")
            colour = hit.path.stem.partition("_")[2]
            caption = f"a {colour} square number {hit.row_id}"
            assert hit.caption == CAPTIONS.get(hit.row_id, caption)


def test_a_picture_finds_itself(searcher: Searcher, store: EmbeddingStore) -> None:
    path = Path(store.metadata([9])[0]["image_path"])
    by_path, by_name, by_picture = searcher.search_images([path, str(path), Image.open(path)], 3)
    assert by_path == by_name == by_picture
    assert (by_path[0].row_id, by_path[0].path) == (9, path)
    assert by_path[0].score == pytest.approx(1, abs=1e-3)


@pytest.mark.parametrize("text", ["", " ", "\t\n", "\u3000"])
def test_a_blank_query_is_refused(searcher: Searcher, text: str) -> None:
    with pytest.raises(ConfigError, match="the query is empty"):
        searcher.search_texts(["a dog", text], 3)


def test_bytes_that_are_no_text_are_refused(searcher: Searcher) -> None:
    with pytest.raises(ConfigError, match="not valid UTF-8"):
        searcher.search_texts([b"caf\xe9".decode(errors="surrogateescape")], 3)


def test_more_results_than_rows_are_refused(searcher: Searcher) -> None:
    assert len(searcher.search_texts(["a"], COUNT)[0]) == COUNT
    with pytest.raises(ConfigError, match="search.k is 31, but the store .* has 30 rows; use sea"):
        searcher.search_texts(["a"], COUNT + 1)
    with pytest.raises(ConfigError, match="search.k is 31"):
        searcher.search_images(["no such file"], COUNT + 1)


def test_an_approximate_index_may_find_fewer(store: EmbeddingStore) -> None:
    index = build_index(FaissConfig(factory="IVF4,Flat", nprobe=1), store)
    hits = Searcher(Encoder(tiny_bundle()), Collection(store, index)).search_texts(["a"], COUNT)[0]
    assert 0 < len(hits) < COUNT
    assert all(isinstance(hit, Hit) for hit in hits)


def test_a_threshold_leaves_out_what_scores_below(searcher: Searcher) -> None:
    every = searcher.search(['2*"red" - "blue"'], Options(k=COUNT))[0]
    limit = every[10].score
    hits = searcher.search(['2*"red" - "blue"'], Options(k=COUNT, threshold=limit))[0]
    assert hits == [hit for hit in every if hit.score >= limit]
    assert 10 < len(hits) < COUNT
    assert searcher.search(["red"], Options(threshold=2.0)) == [[]]
