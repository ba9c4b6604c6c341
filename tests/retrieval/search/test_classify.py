"""Labels against a plain product with the mean of the prompts."""

from __future__ import annotations

import csv
import dataclasses
from pathlib import Path

import numpy as np
import pytest

from tests.helpers import tiny_bundle
from tests.retrieval.conftest import COUNT, UNREADABLE_LATER
from twotower.commands import classify as command
from twotower.config import Config, FreeText, IndexConfig
from twotower.embedding.encoder import Encoder
from twotower.embedding.store import EmbeddingStore
from twotower.retrieval.exact import ExactConfig
from twotower.retrieval.faiss_index import FaissConfig
from twotower.retrieval.search import classify
from twotower.retrieval.search.classify import Classifier, kept_vectors
from twotower.retrieval.search.vocabulary import Vocabulary
from twotower.search_config import ClassifyConfig
from twotower.settings import ConfigError

pytestmark = pytest.mark.usefixtures("any_checkpoint")

WORDS = ("dog", "tabby cat", "a beach", "red", "blue square", "square", "浜辺")
VOCABULARY = Vocabulary(tuple(f"l/{word}" for word in WORDS), WORDS)
TEMPLATES = ("a photo of a {}.", "{}", "the {} in it")


def plain_scores(pictures: np.ndarray) -> np.ndarray:
    """(Q, N): each picture with the mean of each word's prompts."""
    encoder = Encoder(tiny_bundle())
    means = []
    for word in WORDS:
        rows = encoder.encode_texts([text.replace("{}", word) for text in TEMPLATES])
        mean = rows.astype(np.float64).mean(axis=0)
        means.append(mean / np.linalg.norm(mean))
    unit = pictures / np.linalg.norm(pictures, axis=1, keepdims=True)
    return unit.astype(np.float64) @ np.array(means).T


@pytest.mark.parametrize("index", [ExactConfig(), FaissConfig()])
def test_labels_are_the_nearest_words(index: IndexConfig, tmp_path: Path) -> None:
    pictures = np.random.default_rng(0).standard_normal((9, 12)).astype(np.float32)
    encoder = Encoder(tiny_bundle())
    vectors = kept_vectors(VOCABULARY, TEMPLATES, encoder, "sha", tmp_path)
    classifier = Classifier(VOCABULARY, vectors, index)
    want = plain_scores(pictures)
    for labels, scores in zip(classifier.labels(pictures, 3), want, strict=True):
        best = np.argsort(-scores)[:3]
        assert [label.name for label in labels] == [VOCABULARY.labels[i] for i in best]
        np.testing.assert_allclose([label.score for label in labels], scores[best], atol=1e-5)
    assert [len(labels) for labels in classifier.labels(pictures, 100)] == [7] * 9
    above = classifier.labels(pictures, 7, 0.1)
    assert [len(labels) for labels in above] == (want >= 0.1).sum(axis=1).tolist()


def test_a_vocabulary_is_encoded_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    encoder = Encoder(tiny_bundle())
    first = kept_vectors(VOCABULARY, TEMPLATES, encoder, "sha", tmp_path)
    other = kept_vectors(VOCABULARY, TEMPLATES[:1], encoder, "sha", tmp_path)
    assert not np.array_equal(first, other)
    monkeypatch.setattr(classify, "text_vectors", None)
    again = kept_vectors(VOCABULARY, TEMPLATES, encoder, "sha", tmp_path)
    np.testing.assert_array_equal(first, again)
    with pytest.raises(TypeError):
        kept_vectors(VOCABULARY, TEMPLATES, encoder, "another checkpoint", tmp_path)


def section(config: Config, tmp_path: Path, **settings: object) -> Config:
    (tmp_path / "words.txt").write_text("".join(f"l/{word}\t{word}\n" for word in WORDS))
    (tmp_path / "prompts.txt").write_text("\n".join(TEMPLATES))
    values = {"vocabulary": str(tmp_path / "words.txt"), **settings}
    made = ClassifyConfig(templates=str(tmp_path / "prompts.txt"), **values)  # type: ignore[arg-type]
    return dataclasses.replace(config, classify=made)


def written(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def test_the_pictures_of_a_store_and_of_its_folder_get_the_same_labels(
    config: Config,
    store: EmbeddingStore,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    config = section(config, tmp_path, k=2)
    command.run(config, FreeText())
    output = tmp_path / "logs" / "run" / "classify" / "labels.csv"
    assert capsys.readouterr().out.splitlines()[-1] == str(output)
    of_store = written(output)
    rows = np.concatenate(store.image_shards()).astype(np.float64)
    want = plain_scores(rows)
    assert len(of_store) == 2 * COUNT
    for number, row in enumerate(of_store):
        scores = want[number // 2]
        label = f"l/{WORDS[np.argsort(-scores)[number % 2]]}"
        assert (row["label"], row["rank"]) == (label, str(number % 2 + 1))
        assert Path(row["filepath"]).name.startswith(f"{number // 2:04d}_")
        assert float(row["score"]) == pytest.approx(np.sort(scores)[::-1][number % 2], abs=1e-5)
    checkpoint = str(store.folder.parent / "best.safetensors")
    folder = store.folder.parent / "pictures"
    config = dataclasses.replace(config, checkpoint=checkpoint)
    command.run(config, FreeText(path=str(folder)))
    of_folder = written(tmp_path / "logs" / "run" / "classify" / "labels.csv")
    lost = {f"{UNREADABLE_LATER:04d}"}
    best = [(row["filepath"], row["label"]) for row in of_folder if row["rank"] == "1"]
    assert best == [
        (row["filepath"], row["label"])
        for row in of_store
        if row["rank"] == "1" and Path(row["filepath"]).name[:4] not in lost
    ]
    assert f"{UNREADABLE_LATER:04d}_red.jpg cannot be read and has no label" in caplog.text


def test_one_picture_is_labelled_on_the_terminal(
    config: Config, store: EmbeddingStore, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint = str(store.folder.parent / "best.safetensors")
    config = section(config, tmp_path, k=3, output=str(tmp_path / "out.csv"))
    config = dataclasses.replace(config, checkpoint=checkpoint)
    path = store.metadata([9])[0]["image_path"]
    command.run(config, FreeText(path=path))
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["score", "label", "path"]
    assert len(lines) == 5 and lines[-1] == str(tmp_path / "out.csv")
    assert [row["filepath"] for row in written(tmp_path / "out.csv")] == [path] * 3


def test_what_cannot_be_classified_gets_a_sentence(config: Config, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="classify needs classify.vocabulary=<a file or URL"):
        command.run(config, FreeText())
    config = section(config, tmp_path)
    (tmp_path / "empty").mkdir()
    for free, sentence in (
        (FreeText(path="no/such"), "path=no/such: there is no such picture or folder"),
        (FreeText(path=str(tmp_path / "empty")), "empty has no pictures"),
    ):
        with pytest.raises(ConfigError, match=sentence):
            command.run(config, free)
    gone = dataclasses.replace(config, checkpoint="none.safetensors")
    with pytest.raises(ConfigError, match="there is no checkpoint at none.safetensors"):
        command.run(gone, FreeText(path=str(tmp_path / "words.txt")))
