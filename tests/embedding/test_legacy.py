"""The older layout is read as it stands, without running what is in it."""

from __future__ import annotations

import logging
import os
from pathlib import Path

import numpy as np
import pytest
import torch

from twotower.embedding.store import EmbeddingStore
from twotower.settings import ConfigError


class Command:
    """What a malicious file would hold."""

    def __init__(self, made: Path) -> None:
        self.made = made

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, (str(self.made),)


def write_shards(folder: Path) -> tuple[list[str], np.ndarray]:
    """Two ranks of three batches, as either writer saved them; the order without copies."""
    folder.mkdir()
    rows = torch.arange(1, 37, dtype=torch.float32).reshape(12, 3).sqrt()
    files = [
        "0-000-0.ckpt",
        "0-002-1.ckpt",
        "0-010-2.ckpt",
        "1-000-0.pt",
        "1-002-1.pt",
        "1-010-2.pt",
    ]
    names = [f"photos/{place}'s.jpg" for place in range(12)]
    for place, file in enumerate(files):
        part = names[2 * place : 2 * place + 2]
        paths = str(part) if file.endswith("ckpt") else part
        torch.save({"path": paths, "emb": rows[2 * place : 2 * place + 2]}, folder / file)
    # The padding of a distributed sampler: the first picture again, in the last file.
    torch.save({"path": [*names[10:], names[0]], "emb": rows[[10, 11, 0]]}, folder / "1-010-2.pt")
    (folder / "notes.txt").write_text("not a shard")
    return names, (rows / rows.norm(dim=1, keepdim=True)).numpy()


def test_shards_are_one_store_in_the_order_of_their_numbers(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    names, rows = write_shards(tmp_path / "emb")
    store = EmbeddingStore.open(tmp_path / "emb")
    assert len(store) == 12 and store.manifest.dim == 3
    assert store.has_images and not store.has_texts
    assert np.allclose(np.concatenate(store.image_shards()), rows, atol=1e-6)
    assert np.array_equal(store.image_rows([7, 2]), store.image_shards()[0][[7, 2]])
    found = store.metadata([11, 0])
    assert [entry["image_path"] for entry in found] == [names[11], names[0]]
    assert [entry["row_id"] for entry in found] == [11, 0]
    assert found[0]["caption"] == "" and found[0]["captions"] == []
    assert store.table(0, ["row_id", "image_path"]).to_pylist()[7] == {
        "row_id": 7,
        "image_path": names[7],
    }
    assert store.schema() == store.table(0).schema
    assert store.errors() == []
    assert "left out 1 repeated paths" in caplog.text


def test_a_checkpoint_cannot_be_checked_and_that_is_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write_shards(tmp_path / "emb")
    with caplog.at_level(logging.WARNING):
        EmbeddingStore.open(tmp_path / "emb").check_checkpoint(tmp_path / "any")
    assert "does not say which checkpoint made it" in caplog.text


def test_two_folders_have_two_fingerprints(tmp_path: Path) -> None:
    write_shards(tmp_path / "a")
    write_shards(tmp_path / "b")
    torch.save({"path": ["x"], "emb": torch.ones(1, 3)}, tmp_path / "b" / "2-000-0.pt")
    marks = [EmbeddingStore.open(tmp_path / n).manifest.source_fingerprint for n in ("a", "b", "a")]
    assert marks[0] == marks[2] != marks[1]


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ({"path": ["a"], "emb": torch.ones(2, 3)}, r"has 1 paths and vectors of shape \(2, 3\)"),
        ({"path": "['a'", "emb": torch.ones(1, 3)}, "its paths are not a list"),
        ({"path": ["a"]}, "is not an embedding shard"),
        ({"path": ["a"], "emb": torch.ones(1, 4)}, "vectors of dimension 4, the shards before it"),
    ],
)
def test_wrong_shards_get_a_sentence(tmp_path: Path, content: object, sentence: str) -> None:
    write_shards(tmp_path / "emb")
    torch.save(content, tmp_path / "emb" / "3-000-0.pt")
    with pytest.raises(ConfigError, match=sentence):
        EmbeddingStore.open(tmp_path / "emb")


def test_no_code_in_a_shard_is_run(tmp_path: Path) -> None:
    (tmp_path / "emb").mkdir()
    torch.save({"path": Command(tmp_path / "made"), "emb": 1}, tmp_path / "emb" / "0-000-0.pt")
    with pytest.raises(ConfigError, match="is not an embedding shard"):
        EmbeddingStore.open(tmp_path / "emb")
    assert not (tmp_path / "made").exists()
