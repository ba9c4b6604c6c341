from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from twotower.checkpoint.atomic import replacing, replacing_folder
from twotower.settings import ConfigError


def test_the_file_appears_whole_in_a_folder_that_is_made(tmp_path: Path) -> None:
    path = tmp_path / "a" / "b" / "file"
    with replacing(path) as temporary:
        temporary.write_text("new")
        temporary.chmod(0o600)
        assert not path.exists()
    assert path.read_text() == "new"
    ordinary = tmp_path / "ordinary"
    ordinary.touch()
    assert path.stat().st_mode == ordinary.stat().st_mode
    assert os.listdir(path.parent) == ["file"]


@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError(errno.ENOSPC, "No space left")])
def test_an_interrupted_write_leaves_the_old_file(tmp_path: Path, error: BaseException) -> None:
    path = tmp_path / "file"
    path.write_text("old")
    expected = ConfigError if isinstance(error, OSError) else KeyboardInterrupt
    with pytest.raises(expected) as raised, replacing(path) as temporary:
        temporary.write_text("half")
        raise error
    if expected is ConfigError:
        assert str(raised.value) == f"cannot write {path}: No space left"
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["file"]


def test_a_folder_that_is_a_file_is_refused_with_a_sentence(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="^cannot write .*: "), replacing(tmp_path / "file" / "x"):
        pass


def test_a_folder_appears_whole_and_replaces_only_its_like(tmp_path: Path) -> None:
    path = tmp_path / "a" / "folder"
    for text in ("old", "new"):
        with replacing_folder(path) as temporary:
            (temporary / "x").write_text(text)
            assert not path.exists() or (path / "x").read_text() == "old"
    assert (path / "x").read_text() == "new"
    (path / "mine").touch()
    with (
        pytest.raises(ConfigError, match="holds mine, which would be lost"),
        replacing_folder(path) as temporary,
    ):
        (temporary / "x").write_text("newer")
    assert (path / "x").read_text() == "new"
    assert os.listdir(path.parent) == ["folder"]


@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError(errno.ENOSPC, "No space left")])
def test_an_interrupted_folder_leaves_nothing(tmp_path: Path, error: BaseException) -> None:
    expected = ConfigError if isinstance(error, OSError) else KeyboardInterrupt
    with pytest.raises(expected), replacing_folder(tmp_path / "folder") as temporary:
        (temporary / "x").write_text("half")
        raise error
    assert os.listdir(tmp_path) == []
