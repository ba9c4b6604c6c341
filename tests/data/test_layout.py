from pathlib import Path

import pytest

from twotower.data.layout import folder_in_one_piece
from twotower.settings import ConfigError


def test_nothing_is_seen_before_the_end_and_all_after_it(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "data"
    with folder_in_one_piece(path) as temporary:
        (temporary / "file").write_text("x")
        assert not path.exists()
    assert [p.name for p in (tmp_path / "deep").iterdir()] == ["data"]
    assert (path / "file").read_text() == "x"


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_what_is_stopped_leaves_nothing(error: type[BaseException], tmp_path: Path) -> None:
    with pytest.raises(error), folder_in_one_piece(tmp_path / "data") as temporary:
        (temporary / "file").write_text("x")
        raise error
    assert list(tmp_path.iterdir()) == []


def test_an_empty_folder_is_filled_and_the_first_of_two_processes_wins(tmp_path: Path) -> None:
    path = tmp_path / "data"
    path.mkdir()
    with folder_in_one_piece(path) as first, folder_in_one_piece(path) as second:
        (first / "file").write_text("first")
        (second / "file").write_text("second")
    assert (path / "file").read_text() == "second"  # the inner block ends first
    assert [p.name for p in tmp_path.iterdir()] == ["data"]


def test_a_full_disk_is_one_sentence(tmp_path: Path) -> None:
    with (
        pytest.raises(ConfigError, match="data cannot be written: No space left on device"),
        folder_in_one_piece(tmp_path / "data"),
    ):
        raise OSError(28, "No space left on device")
    assert list(tmp_path.iterdir()) == []
