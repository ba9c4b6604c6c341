"""Rocchio's formula, and the search that follows, against plain numpy."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from tests.helpers import tiny_bundle
from twotower.data.manifest import ManifestConfig, load_manifest
from twotower.embedding.encoder import Encoder
from twotower.embedding.store import EmbeddingStore
from twotower.retrieval.build import build_index
from twotower.retrieval.exact import ExactConfig
from twotower.retrieval.search.collection import Collection
from twotower.retrieval.search.conversation import Conversation
from twotower.retrieval.search.feedback import Feedback, rocchio
from twotower.retrieval.search.searcher import Hit, Options, Searcher
from twotower.search_config import FeedbackConfig
from twotower.settings import ConfigError

OPTIONS = Options(k=10)
CONFIG = FeedbackConfig(query_weight=0.8, good_weight=0.5, bad_weight=0.3)


@pytest.fixture
def searcher(store: EmbeddingStore) -> Searcher:
    return Searcher(Encoder(tiny_bundle()), Collection(store, build_index(ExactConfig(), store)))


def unit(rows: np.ndarray) -> np.ndarray:
    rows = rows.astype(np.float64)
    return rows / np.linalg.norm(rows, axis=-1, keepdims=True)


def test_the_formula_of_rocchio() -> None:
    rng = np.random.default_rng(0)
    query, good, bad = (
        rng.standard_normal(12),
        rng.standard_normal((3, 12)),
        rng.standard_normal((2, 12)),
    )
    mean = {"good": unit(good).mean(axis=0), "bad": unit(bad).mean(axis=0)}
    want = unit(0.8 * unit(query) + 0.5 * mean["good"] - 0.3 * mean["bad"])
    np.testing.assert_allclose(rocchio(query, good * 9, bad, CONFIG), want, atol=1e-6)
    want = unit(0.8 * unit(query) - 0.3 * mean["bad"])
    np.testing.assert_allclose(rocchio(query, good[:0], bad, CONFIG), want, atol=1e-6)
    np.testing.assert_allclose(rocchio(query, good[:0], bad[:0], CONFIG), unit(query), atol=1e-6)
    with pytest.raises(ConfigError, match="the query and the judgements cancel each other out"):
        rocchio(query, good[:0], query[None], FeedbackConfig(query_weight=1.0, bad_weight=1.0))


def test_the_search_after_judgements_is_that_of_the_moved_query(
    searcher: Searcher, store: EmbeddingStore
) -> None:
    feedback = Feedback(searcher, '"red" - "blue"', OPTIONS, CONFIG)
    first = feedback.search()
    assert first == searcher.search(['"red" - "blue"'], OPTIONS)[0]
    feedback.mark([1, 4], good=True)
    feedback.mark([2, 4, 6], good=False)
    feedback.mark([6], good=True)
    assert [hit.rank for hit in feedback.good] == [1, 6]
    assert [hit.rank for hit in feedback.bad] == [2, 4]
    red, blue = searcher.encoder.encode_texts(["red", "blue"])
    rows = np.concatenate(store.image_shards()).astype(np.float64)
    good, bad = (
        unit(rows[[hit.row_id for hit in hits]]).mean(axis=0)
        for hits in (feedback.good, feedback.bad)
    )
    query = unit(0.8 * unit(red.astype(float) - blue) + 0.5 * good - 0.3 * bad)
    order = np.argsort(-(rows @ query))[:10]
    again = feedback.search()
    assert [hit.row_id for hit in again] == order.tolist()
    np.testing.assert_allclose([hit.score for hit in again], (rows @ query)[order], atol=1e-6)
    assert feedback.hits == again != first
    with pytest.raises(ConfigError, match="there is no result 11; the last answer has 10"):
        feedback.mark([1, 11], good=False)
    assert len(feedback.good) == len(feedback.bad) == 2


def test_judgements_are_saved_as_training_pairs(
    searcher: Searcher, store: EmbeddingStore, tmp_path: Path
) -> None:
    file = tmp_path / "pairs.csv"
    feedback = Feedback(searcher, "a red square", OPTIONS)
    with pytest.raises(ConfigError, match="nothing is marked good or bad"):
        feedback.save(file)
    feedback.search()
    feedback.mark([1, 3], good=True)
    feedback.mark([2], good=False)
    assert feedback.save(file) == feedback.save(file) == 2
    other = Feedback(searcher, '"red" - "blue"', OPTIONS)
    other.search()
    other.mark([5], good=True)
    with pytest.raises(ConfigError, match="is not words alone, so it is no caption; give one"):
        other.save(file)
    assert other.save(file, "red, not blue") == 3
    pairs = load_manifest(ManifestConfig(manifest=str(file)))
    found = {
        (str(pairs.path(row)), caption)
        for row, captions in enumerate(pairs.table["captions"].to_pylist())
        for caption in captions
    }
    good = [feedback.hits[0], feedback.hits[2]]
    assert found == {(str(hit.path), "a red square") for hit in good} | {
        (str(other.hits[4].path), "red, not blue")
    }
    bad = (tmp_path / "pairs.bad.csv").read_text().splitlines()
    assert bad == ["filepath,caption", f"{feedback.hits[1].path},a red square"]
    (tmp_path / "else.csv").write_text("a,b\n1,2\n")
    for name, sentence in (("else.csv", "holds something else"), ("x.txt", "saved as .csv, not")):
        with pytest.raises(ConfigError, match=sentence):
            feedback.save(tmp_path / name)


def test_a_conversation_judges_and_searches_again(
    searcher: Searcher, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shown: list[tuple[str, list[Hit]]] = []
    talk = Conversation(
        searcher, OPTIONS, CONFIG, lambda hits, label: shown.append((label, list(hits)))
    )
    for line, sentence in (
        (":good 1", "nothing has been searched for yet"),
        (":again", "nothing has been searched for yet"),
        (" ", "the query is empty"),
    ):
        with pytest.raises(ConfigError, match=sentence):
            talk.answer(line)
    for line in ("a red square", ":good 1 3-4,6", ":bad  2", ":again"):
        talk.answer(line)
    want = Feedback(searcher, "a red square", OPTIONS, CONFIG)
    first = want.search()
    want.mark([1, 3, 4, 6], good=True)
    want.mark([2], good=False)
    assert shown == [("a red square", first), ("a red square (4 good, 1 bad)", want.search())]
    talk.answer(f":save {tmp_path / 'pairs.csv'}")
    talk.answer(f":save {tmp_path / 'pairs.csv'} a red one, of course")
    talk.answer(":help")
    printed = capsys.readouterr().out.splitlines()
    assert printed[:2] == ["4 good, 0 bad", "4 good, 1 bad"]
    assert [line.split(": ")[1] for line in printed[2:4]] == [
        "4 training pairs",
        "8 training pairs",
    ]
    assert printed[-1].startswith(":help")
    for line, sentence in (
        (":good", "say which results, as in :good 1 3-5"),
        (":bad one", "'one' is no rank of a result"),
        (":bad 5-3", "'5-3' is no rank of a result"),
        (":bad 0", "there is no result 0"),
        (":good 1-99999", "1-99999 are too many results"),
        (":again now", ":again stands alone, without 'now'"),
        (":save", ":save needs the name of a file"),
        (":save no.txt", "saved as .csv"),
    ):
        with pytest.raises(ConfigError, match=sentence):
            talk.answer(line)
    talk.answer(":goodness gracious")  # a word of its own, and so a query
    talk.answer(":dog:")
    assert [label for label, _ in shown[2:]] == [":goodness gracious", ":dog:"]
