from __future__ import annotations

import pytest

from twotower.retrieval.benchmark import other_load
from twotower.retrieval.benchmark.other_load import OtherLoad


def test_the_share_of_others_is_busy_time_without_our_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(other_load.os, "cpu_count", lambda: 2)
    seconds = iter(
        [(100.0, 50.0, 5.0), (110.0, 63.0, 12.0), (101.0, 50.0, 7.0), (101.0, 60.0, 5.0)]
    )
    monkeypatch.setattr(other_load, "_seconds", lambda: next(seconds))
    load = OtherLoad()
    assert load.share() == (13 - 7) / 20
    assert load.share() == 0  # the clocks of the two are not quite the same
    assert load.share() == 1


def test_it_is_unknown_where_the_system_does_not_tell(monkeypatch: pytest.MonkeyPatch) -> None:
    known = OtherLoad().share()
    assert known is None or 0 <= known <= 1
    monkeypatch.setattr(other_load, "_seconds", lambda: None)
    assert OtherLoad().share() is None
