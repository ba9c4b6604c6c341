from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from twotower.retrieval.exact import ExactConfig, ExactIndex
from twotower.retrieval.faiss_index import FaissConfig, FaissIndex
from twotower.retrieval.index import VectorIndex
from twotower.retrieval.saved import load_index, save_index
from twotower.settings import ConfigError

ROWS = np.random.default_rng(0).standard_normal((40, 6)).astype(np.float32)


def exact() -> ExactIndex:
    index = ExactIndex(ExactConfig(), 6)
    index.add(ROWS)
    return index


def test_a_later_save_replaces_the_earlier_and_leaves_no_file_behind(tmp_path: Path) -> None:
    index = exact()
    save_index(index, tmp_path / "index")
    index.add(ROWS)
    save_index(index, tmp_path / "index")
    assert len(load_index(tmp_path / "index")) == 80
    assert len(list((tmp_path / "index").iterdir())) == 2


def test_a_save_that_fails_leaves_the_earlier_index(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    index = exact()
    save_index(index, tmp_path / "index")
    index.add(ROWS)

    def full_disk(file: Path) -> None:
        file.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(index, "write", full_disk)
    with pytest.raises(ConfigError, match="cannot write .*: No space left on device"):
        save_index(index, tmp_path / "index")
    assert len(load_index(tmp_path / "index")) == 40
    assert len(list((tmp_path / "index").iterdir())) == 2


@pytest.mark.parametrize("kind", ["exact", "faiss"])
def test_a_damaged_index_is_named(kind: str, tmp_path: Path) -> None:
    index: VectorIndex = exact()
    if kind == "faiss":
        index = FaissIndex(FaissConfig(), 6)
        index.add(ROWS)
    with pytest.raises(ConfigError, match="holds no index; build one first"):
        load_index(tmp_path)
    save_index(index, tmp_path)
    data = next(tmp_path.glob("*.bin"))
    whole = data.read_bytes()
    for broken in (whole[: len(whole) // 2], b"", b"something else" * 100):
        data.write_bytes(broken)
        with pytest.raises(ConfigError, match=f"the index {tmp_path} is damaged; build it again"):
            load_index(tmp_path)
    data.unlink()
    with pytest.raises(ConfigError, match="is damaged"):
        load_index(tmp_path)
    data.write_bytes(whole)
    manifest = json.loads((tmp_path / "index.json").read_text())
    for change, sentence in (
        ({"rows": 41}, "is damaged"),
        ({"kind": "annoy"}, "another version of twotower"),
        ({"format": 1}, "another version of twotower"),
        ({"config": {"blocks": 3}}, "index.blocks is not known"),
    ):
        (tmp_path / "index.json").write_text(json.dumps({**manifest, **change}))
        with pytest.raises(ConfigError, match=sentence):
            load_index(tmp_path)
    (tmp_path / "index.json").write_text("{}")
    with pytest.raises(ConfigError, match="is damaged"):
        load_index(tmp_path)
