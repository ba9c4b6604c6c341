from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.retrieval.written import clustered_rows, write_store
from twotower.config import Config, FreeText, IndexConfig
from twotower.embedding.store import EmbeddingStore
from twotower.retrieval.auto.card import Card, Tried, advice
from twotower.retrieval.auto.choice import choose
from twotower.retrieval.auto.config import AutoConfig, Preference
from twotower.retrieval.auto.measure import Interval
from twotower.retrieval.build import build_index
from twotower.retrieval.exact import ExactConfig, ExactIndex
from twotower.retrieval.faiss_index import FaissConfig
from twotower.retrieval.index import Modality, VectorIndex, unit_rows
from twotower.retrieval.indexing import index_store
from twotower.retrieval.kept import open_index
from twotower.retrieval.rerank import RerankedIndex
from twotower.settings import ConfigError

# Wide enough that no machine is too slow: what is tested is the choice.
SLOW = {"max_latency_ms": 1e6, "num_queries": 200}


@pytest.fixture
def written(tmp_path: Path) -> EmbeddingStore:
    """Pictures on one side, their captions on another, as a dual encoder leaves them."""
    rows = clustered_rows(600)
    offset = np.zeros(12)
    offset[0] = 2
    texts = unit_rows(np.roll(rows, 1, axis=1) + rows - offset)
    return write_store(tmp_path / "store", rows, {}, 250, texts=texts)


def test_few_rows_are_searched_exactly_and_it_says_why(
    config: Config, written: EmbeddingStore, capsys: pytest.CaptureFixture[str]
) -> None:
    auto = AutoConfig()
    index_store(dataclasses.replace(config, index=auto, store=str(written.folder)), FreeText())
    said = capsys.readouterr().out
    assert "exact: below 20,000 rows a scan of all of them takes a fraction" in said
    folder = written.folder.parent / "index" / "store-auto"
    card = json.loads((folder / "index_card.json").read_text())
    assert (card["chosen"], card["queries"]) == ("exact", "none")
    assert card["fingerprint"] == json.loads((folder / "index.json").read_text())["fingerprint"]
    assert isinstance(open_index(auto, written), ExactIndex)


def test_the_fastest_that_reaches_the_target_is_kept(
    written: EmbeddingStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    speed = {"exact": 3.0, "SQ8": 2.0, "IVF8,Flat": 1.0, "PQ2x4": 0.5}

    def timed(index: object, vectors: object, k: int) -> tuple[float, float]:
        factory = getattr(index.config, "factory", "exact")  # type: ignore[attr-defined]
        return speed[factory], speed[factory]

    monkeypatch.setattr("twotower.retrieval.auto.choice.latency_ms", timed)
    config = AutoConfig(candidates=list(speed), target_recall=0.9, **SLOW)  # type: ignore[arg-type]
    config = dataclasses.replace(config, num_queries=60)
    index, card = choose(config, written)
    # PQ2x4 reaches it too, with enough candidates.
    assert card.chosen == "PQ2x4"
    assert isinstance(index, RerankedIndex)
    tried = {entry.name: entry for entry in card.tried}
    assert tried["PQ2x4"].tuned == {"rerank": index.config.rerank}
    assert set(tried["IVF8,Flat"].tuned) == {"nprobe"}
    assert tried["IVF8,Flat"].note == "takes 1.00 ms, more than 0.50"
    for entry in card.tried:
        assert entry.recalls["text"].high >= 0.9
        assert set(entry.recalls) == {"text", "image"}
    assert tried["exact"].recalls["text"].value == tried["exact"].recalls["image"].value == 1
    smallest = dataclasses.replace(config, prefer=Preference.memory)
    assert choose(smallest, written).card.chosen == "PQ2x4"
    # What is too slow, or too large, falls out.
    quick = choose(dataclasses.replace(config, max_latency_ms=0.4), written).card
    assert "comes nearest, but takes more than 0.4 ms" in quick.reason
    small = choose(dataclasses.replace(config, max_memory_gb=600 * 25 / 1e9), written).card
    notes = {entry.name: entry.note for entry in small.tried}
    assert small.chosen == "PQ2x4"
    assert "not built: it would take some" in notes["exact"]


def test_measures_by_hand_what_it_says(written: EmbeddingStore) -> None:
    config = AutoConfig(candidates=["IVF8,Flat"], target_recall=0.8, **SLOW)  # type: ignore[arg-type]
    index, card = choose(config, written)
    rows = np.concatenate(written.image_shards())
    texts = np.concatenate(written.text_shards())
    for kind, queries in (("text", texts), ("image", rows)):
        scores = queries @ rows.T
        if kind == "image":
            np.fill_diagonal(scores, -2)
        best = np.argsort(-scores, axis=1)[:, :10]
        found = index.search(queries, 11).ids
        hits = []
        for query in range(600):
            others = [i for i in found[query] if kind == "text" or i != query][:10]
            hits.append(len(set(others) & set(best[query].tolist())) / 10)
        share = card.best.recalls[kind]
        assert share.low - 0.02 <= np.mean(hits) <= share.high + 0.02


def test_tuned_on_pictures_texts_would_find_less(written: EmbeddingStore) -> None:
    config = AutoConfig(candidates=["IVF16,Flat"], **SLOW)  # type: ignore[arg-type]
    card = choose(config, written).card
    usual = card.best.if_tuned_on_images
    assert card.best.recalls["text"].value > usual["text"]
    assert usual["image"] > usual["text"]
    assert any("tuned on pictures, as is usual" in sentence for sentence in card.advice)


@pytest.mark.parametrize(
    ("text", "image", "warns"),
    [(0.949, 0.97, True), (0.8, 0.95, True), (0.95, 0.99, False), (0.9, 0.94, False)],
)
def test_warns_of_texts_that_miss_what_pictures_reach(
    text: float, image: float, warns: bool
) -> None:
    # Whatever the intervals: with few queries they are wide.
    recalls = {
        name: Interval(value, value - 0.1, min(1.0, value + 0.1))
        for name, value in (("text", text), ("image", image))
    }
    card = Card("one", "", [Tried("one", {}, 0, 0, recalls=recalls)], "", {}, 0.95, 10, "text")
    sentence = f"text queries find {text:.3f} of the best 10, below the target 0.95"
    assert card.warning().startswith(sentence if warns else "")
    assert bool(card.warning()) == warns == any(sentence in line for line in advice(card))


def test_an_index_for_which_the_memory_is_too_small_falls_out(
    written: EmbeddingStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    def built(config: IndexConfig, *args: Any, **kwargs: Any) -> VectorIndex:
        if isinstance(config, FaissConfig) and config.factory == "SQ8":
            raise MemoryError
        return build_index(config, *args, **kwargs)

    monkeypatch.setattr("twotower.retrieval.auto.choice.build_index", built)
    card = choose(AutoConfig(candidates=["exact", "SQ8"], **SLOW), written).card  # type: ignore[arg-type]
    assert [entry.note for entry in card.tried] == ["", "not built: the memory is full"]


def test_the_memory_is_what_is_free_before_the_first_index(
    written: EmbeddingStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    free: list[int | None] = [600 * 40]
    monkeypatch.setattr("twotower.retrieval.auto.config.free_bytes", lambda: free.pop())
    config = AutoConfig(candidates=["exact", "Flat"], **SLOW)  # type: ignore[arg-type]
    tried = choose(config, written).card.tried
    assert "Flat" in tried[1].name and "beyond the memory" in tried[1].note
    free[:] = [2**60, 1000, None]
    machine = AutoConfig().memory
    assert AutoConfig().memory == 1000
    assert 1000 < AutoConfig().memory == machine < 2**50


def test_without_captions_it_says_that_nothing_is_known_of_texts(
    tmp_path: Path, config: Config, capsys: pytest.CaptureFixture[str]
) -> None:
    store = write_store(tmp_path / "bare", clustered_rows(300), {}, 250)
    auto = AutoConfig(candidates=["IVF8,Flat", "Nothing"], **SLOW)  # type: ignore[arg-type]
    index_store(dataclasses.replace(config, index=auto, store=str(store.folder)), FreeText())
    said = capsys.readouterr().out
    assert "the store has no captions, so nothing is known of text queries" in said
    assert "text recall@" not in said
    assert "not built: index.factory 'Nothing' cannot be built" in said
    with pytest.raises(ConfigError, match="none of the indexes could be built"):
        choose(dataclasses.replace(auto, candidates=["Nothing"]), store)


def test_a_search_keeps_the_exact_index_only_where_it_was_measured(
    written: EmbeddingStore,
) -> None:
    beside = written.folder.parent / "index"
    open_index(AutoConfig(), written)
    assert not beside.exists()
    auto = AutoConfig(candidates=["exact", "Nothing"], num_queries=40)
    assert isinstance(open_index(auto, written), ExactIndex)
    assert (beside / "store-auto" / "index_card.md").is_file()


def test_a_search_opens_what_was_chosen_whatever_it_asks(
    config: Config, written: EmbeddingStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    auto = AutoConfig(candidates=["SQ8", "PQ2x4"], **SLOW)  # type: ignore[arg-type]
    index_store(dataclasses.replace(config, index=auto, store=str(written.folder)), FreeText())

    def not_again(*args: object, **kwargs: object) -> None:
        raise AssertionError("built again")

    monkeypatch.setattr("twotower.retrieval.kept.choose", not_again)
    queries = np.concatenate(written.image_shards())[:9]
    found = open_index(AutoConfig(), written)
    assert isinstance(found, RerankedIndex)
    exact = ExactIndex(ExactConfig(), 12)
    exact.add(np.concatenate(written.image_shards()), normalized=True)
    best = exact.search(queries, 1)
    assert (found.search(queries, 1).ids == best.ids).mean() > 0.7
    with pytest.raises(AssertionError, match="built again"):
        open_index(AutoConfig(), written, modality=Modality.texts)
