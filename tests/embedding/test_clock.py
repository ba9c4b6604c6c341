"""What limits the rate is named, with what to do about it."""

from __future__ import annotations

import os
import time

import pytest

from twotower.embedding.clock import InputClock


def measured(monkeypatch: pytest.MonkeyPatch, waiting: float, working: float) -> InputClock:
    """A clock that has seen 30 batches."""
    now = 0.0

    def batches() -> object:
        nonlocal now
        for number in range(31):
            now += waiting if number else 1000.0  # workers that start
            yield number

    monkeypatch.setattr(time, "perf_counter", lambda: now)
    clock = InputClock()
    for _ in clock.waiting(batches()):
        now += working
    return clock


def test_waiting_for_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: range(8))
    clock = measured(monkeypatch, waiting=3, working=1)
    assert clock.share == 0.75 and clock.note() == "waiting for pictures 75 %"
    said = clock.sentence(workers=0, ranks=2)
    assert said.startswith("reading is the bottleneck: pictures were waited for in 75 % of the")
    assert "set encode.num_workers=3 (now 0; there are 8 cores)" in said
    assert "store the pictures near the size" in clock.sentence(workers=3, ranks=2)


def test_computing(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = measured(monkeypatch, waiting=1, working=19)
    assert clock.note() == ""
    assert clock.sentence(0, 1).startswith("the model is the bottleneck: pictures were waited for")
    assert InputClock().sentence(0, 1) == ""
