from __future__ import annotations

import itertools
import signal
import time

import pytest

from tests.retrieval.benchmark.helpers import Recorder, section, some_rows
from twotower.retrieval.benchmark import rounds
from twotower.retrieval.benchmark.contenders import Cell
from twotower.retrieval.benchmark.rounds import (
    Interrupt,
    Plan,
    cells_of,
    drawn_order,
    make_plan,
    measure,
    run_rounds,
    try_cells,
)

FOREVER = float("inf")


def planned(contenders: list[Recorder], plan: Plan, deadline: float = FOREVER) -> rounds.Times:
    return run_rounds(contenders, some_rows(5), plan, deadline, lambda: None, Interrupt())


@pytest.mark.parametrize("cell", [Cell(1, 5), Cell(256, 10)])
def test_everyone_follows_everyone_else_in_some_round(cell: Cell) -> None:
    everyone = [Recorder(name, []) for name in "abcd"]
    orders = [[one.name for one in drawn_order(everyone, cell, turn)] for turn in range(40)]
    assert all(sorted(order) == list("abcd") for order in orders)
    pairs = {pair for order in orders for pair in itertools.pairwise(order)}
    assert pairs == set(itertools.permutations("abcd", 2))
    assert orders[7] == [one.name for one in drawn_order(everyone, cell, 7)]


def test_a_pause_stands_before_every_turn_and_counts_in_the_plan(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    calls: list[tuple[str, int]] = []
    monkeypatch.setattr(rounds, "PAUSE", 0.1)
    monkeypatch.setattr(time, "sleep", lambda seconds: calls.append(("pause", seconds)))
    planned([Recorder("a", calls), Recorder("b", calls)], Plan({Cell(8, 5): 1}, rounds=2))
    assert [name == "pause" for name, _ in calls] == [True, False] * 4
    # Three rounds of two cells with five turns each pause for three seconds.
    seconds = {Cell(1, 5): 1e-4, Cell(2, 5): 1e-4}
    assert make_plan(seconds, section(rounds=3), 3.1, turns=5).rounds == 3
    assert make_plan(seconds, section(rounds=3), 2.9, turns=5).cut == [Cell(1, 5)]


def test_contenders_take_turns_within_a_round_in_the_order_that_is_drawn() -> None:
    calls: list[tuple[str, int]] = []
    plan = Plan({Cell(1, 5): 2, Cell(8, 5): 1}, rounds=2)
    both = [Recorder("a", calls), Recorder("b", calls)]
    times = planned(both, plan)
    # One call before several timed ones, none before a single one.
    assert calls == [
        (one.name, cell.queries)
        for turn in range(2)
        for cell, count in ((Cell(1, 5), 3), (Cell(8, 5), 1))
        for one in drawn_order(both, cell, turn)
        for _ in range(count)
    ]
    lengths = {key: [len(each) for each in found] for key, found in times.rounds.items()}
    assert lengths == {
        **{(name, Cell(1, 5)): [2, 2] for name in "ab"},
        **{(name, Cell(8, 5)): [1, 1] for name in "ab"},
    }
    assert not times.notes and not times.interrupted


@pytest.mark.parametrize("count", [1, 3, 5, 20, 50])
@pytest.mark.parametrize("size", [1, 16, 256])
def test_percentiles_are_from_twenty_calls_at_least(size: int, count: int) -> None:
    plan = make_plan({Cell(size, 5): 1e-3}, section(rounds=count), FOREVER, 1)
    assert plan.calls[Cell(size, 5)] * plan.rounds >= 20
    assert not plan.notes


def test_what_does_not_fit_is_cut_and_said_calls_first_then_rounds_then_cells() -> None:
    config = section(rounds=5, max_seconds=60)
    cheap, dear = Cell(1, 5), Cell(4096, 5)
    seconds = {cheap: 0.01, dear: 2.0}  # all calls: 5 * (33 * 0.01 + 5 * 2)
    assert make_plan(seconds, config, 60, 1).notes == []
    fewer = make_plan(seconds, config, 25, 1)
    assert (fewer.calls, fewer.rounds) == ({cheap: 13, dear: 1}, 5)
    assert len(fewer.notes) == 1 and "Q=1,4096 k=5" in fewer.notes[0]
    short = make_plan(seconds, config, 7, 1)
    assert (short.calls[dear], short.rounds) == (1, 3)
    assert "3 of 5 rounds fit into the time" in short.notes
    shortest = make_plan(seconds, config, 3, 1)
    assert (list(shortest.calls), shortest.cut) == ([cheap], [dear])
    nothing = make_plan(seconds, config, -1, 1)
    assert (list(nothing.calls), nothing.rounds) == ([cheap], 1)


def test_cells_that_would_take_too_long_are_not_even_tried(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(rounds, "_time_calls", lambda *_, **__: [3.0])
    config = section(queries=[1, 2, 128], k=[5, 1], max_seconds=60)
    assert cells_of(config) == [Cell(q, k) for q in (1, 2, 128) for k in (1, 5)]
    contender = Recorder("a", [])
    seconds, cut = try_cells([contender], some_rows(5), config, Interrupt())
    assert list(seconds) == contender.prepared == [Cell(q, k) for q in (1, 2) for k in (1, 5)]
    assert cut == [Cell(128, 1), Cell(128, 5)]
    times = measure([contender], some_rows(5), config, lambda: None)
    assert "not measured, for benchmark.max_seconds=60: Q=128 k=1,5" in times.notes


def test_a_trial_that_takes_too_long_is_left() -> None:
    first, second = Recorder("a", []), Recorder("b", [])
    rest = (Cell(64, 5), some_rows(5), Interrupt())
    assert rounds._try_cell([first, second], *rest, limit=0.0) is None
    assert (len(first.prepared), len(second.prepared)) == (1, 0)
    assert rounds._try_cell([first, second], *rest, limit=FOREVER) > 0  # type: ignore[operator]


def test_nobody_takes_no_time() -> None:
    assert measure([], some_rows(5), section(max_seconds=1e-9), lambda: None).rounds == {}


def test_no_round_begins_after_the_deadline() -> None:
    plan = Plan({Cell(1, 5): 1}, rounds=4)
    times = planned([Recorder("a", [])], plan, deadline=time.perf_counter() - 1)
    assert [len(found) for found in times.rounds.values()] == [1]
    assert times.notes == ["stopped after 1 of 4 rounds, for time"]


def test_ctrl_c_keeps_what_was_measured() -> None:
    calls: list[tuple[str, int]] = []
    before = signal.getsignal(signal.SIGINT)
    config = section(queries=[64], rounds=3, max_seconds=0)
    # One call each to try, 8 each in a round: this one is in the second, where the first begins.
    interrupted = Recorder("b", calls, interrupt_at=2 + 2 * 8 + 2)
    contenders = [interrupted, Recorder("a", calls)]
    assert drawn_order(contenders, Cell(64, 5), 1) == contenders
    times = measure(contenders, some_rows(5), config, lambda: None)
    assert times.interrupted
    assert times.notes == ["stopped in round 2 of 3 by Ctrl-C"]
    assert {name: len(found) for (name, _), found in times.rounds.items()} == {"a": 1, "b": 2}
    assert signal.getsignal(signal.SIGINT) is before


def test_ctrl_c_while_trying_stops() -> None:
    interrupted = Recorder("a", [], interrupt_at=1)
    with pytest.raises(KeyboardInterrupt):
        measure([interrupted], some_rows(5), section(), lambda: None)


def test_a_second_ctrl_c_does_not_wait() -> None:
    interrupt = Interrupt()
    interrupt.remember(signal.SIGINT, None)
    assert interrupt.asked
    with pytest.raises(KeyboardInterrupt):
        interrupt.remember(signal.SIGINT, None)
