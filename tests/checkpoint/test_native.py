from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from twotower.checkpoint.native import (
    file_sha256,
    load_checkpoint,
    read_header,
    save_checkpoint,
)
from twotower.settings import ConfigError

HEADER = {"variant": "x", "assets": {"words": "größe 日本\n"}, "metrics": {"recall": 0.5}}


def weights() -> dict[str, torch.Tensor]:
    whole = torch.arange(12.0).view(3, 4)
    return {
        "whole": whole,
        "same": whole,
        "turned": whole.T,
        "half": torch.ones(2, dtype=torch.float16),
        "count": torch.tensor(7),
        "empty": torch.zeros(0, 3),
    }


def test_weights_and_header_come_back_equal(tmp_path: Path) -> None:
    path = tmp_path / "run" / "best.safetensors"
    save_checkpoint(path, weights(), HEADER)
    header, loaded = load_checkpoint(path)
    assert header == read_header(path) == HEADER
    assert loaded.keys() == weights().keys()
    for name, tensor in weights().items():
        assert torch.equal(loaded[name], tensor) and loaded[name].dtype == tensor.dtype


def test_a_failed_write_keeps_the_previous_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "last.safetensors"
    save_checkpoint(path, weights(), HEADER)
    before = path.read_bytes()

    def full(tensors: Any, file: Path, metadata: Any) -> None:
        file.write_bytes(b"half")
        raise SafetensorError("I/O error: No space left on device (os error 28)")

    monkeypatch.setattr("safetensors.torch.save_file", full)
    with pytest.raises(ConfigError, match=r"^cannot write .*No space left on device"):
        save_checkpoint(path, weights(), HEADER)
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["last.safetensors"]


def test_what_is_no_checkpoint_gets_one_sentence(tmp_path: Path) -> None:
    whole = tmp_path / "whole.safetensors"
    save_checkpoint(whole, weights(), HEADER)
    cut = tmp_path / "cut.safetensors"
    cut.write_bytes(whole.read_bytes()[:-9])
    text = tmp_path / "text.safetensors"
    text.write_text("not tensors")
    foreign = tmp_path / "foreign.safetensors"
    save_file({"a": torch.ones(1)}, foreign)
    empty = tmp_path / "empty.safetensors"
    empty.touch()
    sentences = {
        tmp_path / "none.safetensors": "no such checkpoint: {}; train one first",
        tmp_path: "{} is a folder; give a checkpoint file",
        cut: "{} cannot be read as a checkpoint: it is truncated",
        text: "{} cannot be read as a checkpoint: it is truncated",
        empty: "{} cannot be read as a checkpoint: it is truncated",
        foreign: "{} holds tensors, but twotower did not write it",
    }
    for path, sentence in sentences.items():
        for read in (read_header, load_checkpoint):
            with pytest.raises(ConfigError) as raised:
                read(path)
            assert str(raised.value).startswith(sentence.format(path))
            assert "\n" not in str(raised.value)


def test_sha256_is_that_of_the_bytes(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"twotower" * 1000)
    assert file_sha256(path) == hashlib.sha256(b"twotower" * 1000).hexdigest()
