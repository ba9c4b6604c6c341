from __future__ import annotations

import hashlib
import os
import urllib.error
from pathlib import Path
from typing import Any

import pytest

from twotower.checkpoint.download import cached_file, download, reach_hub
from twotower.settings import ConfigError

CONTENT = b"weights" * 5000
SHA256 = hashlib.sha256(CONTENT).hexdigest()


@pytest.fixture
def url(tmp_path: Path) -> str:
    source = tmp_path / "server" / "model.pt"
    source.parent.mkdir()
    source.write_bytes(CONTENT)
    return source.as_uri()


def test_a_file_is_fetched_once_and_checked(
    tmp_path: Path, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = tmp_path / "cache"
    assert cached_file(url, SHA256, cache) is None
    path = download(url, SHA256, cache)
    assert path == cache / "model.pt" and path.read_bytes() == CONTENT
    monkeypatch.setattr("urllib.request.urlopen", None)
    assert download(url, SHA256, cache) == cached_file(url, SHA256, cache) == path


def test_a_damaged_copy_is_fetched_again(tmp_path: Path, url: str) -> None:
    (tmp_path / "model.pt").write_bytes(CONTENT[:-1])
    assert cached_file(url, SHA256, tmp_path) is None
    assert download(url, SHA256, tmp_path).read_bytes() == CONTENT


def test_a_wrong_checksum_keeps_nothing(tmp_path: Path, url: str) -> None:
    cache = tmp_path / "cache"
    with pytest.raises(ConfigError, match="does not have the SHA-256 .*; nothing was kept"):
        download(url, "0" * 64, cache)
    assert os.listdir(cache) == []


def test_no_network_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise urllib.error.URLError("no route")

    monkeypatch.setattr("urllib.request.urlopen", refuse)
    with pytest.raises(ConfigError) as raised:
        download("https://host.invalid/x.pt", SHA256, tmp_path)
    assert str(raised.value) == (
        f"cannot download https://host.invalid/x.pt (no route); put the file at "
        f"{tmp_path / 'x.pt'}, or give the path of a local one"
    )
    assert os.listdir(tmp_path) == []


def test_a_hub_that_does_not_answer_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise OSError("unreachable")

    monkeypatch.setattr("socket.create_connection", refuse)
    monkeypatch.setattr("urllib.request.getproxies", dict)
    monkeypatch.setenv("HF_ENDPOINT", "https://hub.invalid")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    reach_hub("model.text_encoder", "bert-base-uncased")
    monkeypatch.delenv("HF_HUB_OFFLINE")
    with pytest.raises(ConfigError) as raised:
        reach_hub("model.text_encoder", "bert-base-uncased")
    assert str(raised.value) == (
        "model.text_encoder=bert-base-uncased is not a local path, and hub.invalid does not "
        "answer; check the network, give a local path, or set HF_HUB_OFFLINE=1 to use what was "
        "downloaded before"
    )
