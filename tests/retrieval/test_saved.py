from __future__ import annotations

import json
import os
import time
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


def test_of_two_saves_at_once_both_files_are_whole_while_they_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = exact(), exact()
    second.add(ROWS)
    save_index(exact(), tmp_path)
    write = first.write

    def overtaken(file: Path) -> None:
        """The other one begins later and ends earlier."""
        write(file)
        save_index(second, tmp_path)
        assert len(load_index(tmp_path)) == 80

    monkeypatch.setattr(first, "write", overtaken)
    save_index(first, tmp_path)
    assert len(load_index(tmp_path)) == 40
    assert len(list(tmp_path.iterdir())) == 2
    # A data file that no manifest names yet is that of another saver.
    write_other = second.write

    def overtaking(file: Path) -> None:
        write_other(file)
        file.with_name("index-ffff.bin").write_bytes(file.read_bytes())
        save_index(exact(), tmp_path)
        assert file.with_name("index-ffff.bin").is_file()

    monkeypatch.setattr(second, "write", overtaking)
    save_index(second, tmp_path)
    assert len(load_index(tmp_path)) == 80


def test_an_index_that_is_replaced_while_it_is_opened_is_opened_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_index(exact(), tmp_path)
    later = exact()
    later.add(ROWS)
    read, calls = ExactIndex.read, []

    def replaced(self: ExactIndex, file: Path) -> None:
        if not calls:
            save_index(later, tmp_path)
        calls.append(file)
        read(self, file)

    monkeypatch.setattr(ExactIndex, "read", replaced)
    assert len(load_index(tmp_path)) == 80
    assert len(calls) == 2


def test_what_killed_savers_have_left_goes_after_a_day(tmp_path: Path) -> None:
    names = [".index-1.bin.7-1.tmp", ".index.json.7-1.tmp", "index-1.bin", "index-1-0000.bin"]
    for age, folder in ((0, tmp_path / "new"), (100_000, tmp_path / "old")):
        folder.mkdir()
        for name in [*names, "notes.txt"]:
            (folder / name).touch()
            os.utime(folder / name, (time.time() - age,) * 2)
        save_index(exact(), folder)
        left = {path.name for path in folder.iterdir()}
        assert left.issuperset(names) == (age == 0)
        assert left.isdisjoint(names) == (age > 0)
        assert "notes.txt" in left


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
