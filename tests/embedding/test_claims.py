"""One owner a claim; it is free again when the owner is dead or has not moved for long."""

from __future__ import annotations

import json
import os
import threading
import time
from pathlib import Path

import pytest

from twotower.embedding import claims as module
from twotower.embedding.claims import Claims
from twotower.settings import ConfigError


def test_one_owner_until_it_is_released(tmp_path: Path) -> None:
    with Claims(tmp_path / "store") as one, Claims(tmp_path / "store") as two:
        assert one.take("3") and not two.take("3") and two.take("4")
        assert two.owner("3").startswith(f"process {os.getpid()} on ")
        one.release("3")
        assert two.owner("3") == "" and two.take("3")
    # Nothing is left behind, and nothing was put into the store.
    assert list(tmp_path.iterdir()) == []


def test_a_dead_process_holds_nothing(tmp_path: Path) -> None:
    child = os.fork()
    if not child:
        Claims(tmp_path / "store").take("3")
        os._exit(0)
    os.waitid(os.P_PID, child, os.WEXITED | os.WNOWAIT)
    claims = Claims(tmp_path / "store")
    assert claims.take("3")  # while it is a zombie
    claims.release("3")
    # The number of the process belongs to another one now.
    os.waitpid(child, 0)
    owner = {**module._this_process(), "born": 1}
    (claims.folder / "3").write_text(json.dumps(owner))
    assert claims.take("3")


@pytest.mark.parametrize("text", ['{"host": "elsewhere", "pids": "", "pid": 1, "born": 5}', ""])
def test_another_machine_loses_what_it_does_not_move(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str
) -> None:
    claims = Claims(tmp_path / "store")
    claims.folder.mkdir()
    (claims.folder / "3").write_text(text)
    clock = 1000.0
    monkeypatch.setattr(time, "monotonic", lambda: clock)
    assert not claims.take("3")
    clock += module.SECONDS_TO_BE_STALE
    assert not claims.take("3")
    os.utime(claims.folder / "3", (1, 1))  # it has moved, whatever its clock says
    clock += 1
    assert not claims.take("3")
    clock += module.SECONDS_TO_BE_STALE + 1
    assert claims.take("3")


def test_a_claim_of_the_living_moves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "SECONDS_BETWEEN_BEATS", 0.01)
    with Claims(tmp_path / "store") as claims:
        claims.take("3")
        os.utime(claims.folder / "3", (1, 1))
        while (claims.folder / "3").stat().st_mtime == 1:
            time.sleep(0.01)


def test_those_who_do_the_same_work_together_and_others_wait(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    done: list[str] = []

    def other() -> None:
        with Claims(tmp_path / "store") as claims, claims.working("b"):
            done.append("b")

    with Claims(tmp_path / "store") as one, Claims(tmp_path / "store") as two:
        with one.working("a"), two.working("a"):
            dead = {**module._this_process(), "born": 1}
            (one.folder / "job-c-0").write_text(json.dumps(dead))  # holds nobody back
            thread = threading.Thread(target=other)
            thread.start()
            while "waiting for process" not in caplog.text:
                time.sleep(0.01)
            done.append("a")
        thread.join()
    assert done == ["a", "b"]
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_made_is_said(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "nowhere" / "far")
    with pytest.raises(ConfigError, match="cannot make the folder .*link: File exists"):
        Claims(tmp_path / "link" / "store").take("3")


def test_no_links_no_harm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*names: object) -> None:
        raise PermissionError

    monkeypatch.setattr(os, "link", refuse)
    with Claims(tmp_path / "store") as one, Claims(tmp_path / "store") as two:
        assert one.take("3") and not two.take("3")
