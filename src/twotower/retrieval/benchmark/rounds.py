"""Time in rounds: every contender takes its turn in each, so what else happens hits all of them."""

from __future__ import annotations

import logging
import math
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import FrameType

import numpy as np

from twotower.benchmark_config import BenchmarkConfig
from twotower.console import progress
from twotower.retrieval.benchmark.contenders import Cell, Contender, cells_text, label
from twotower.retrieval.index import FloatArray

log = logging.getLogger(__name__)

CALLS = 32  # searches a round at one query a call; larger batches get fewer, so that all take alike
LEAST_CALLS = 20  # timed in all rounds, at least: a 95th percentile of fewer is their maximum
LEAST_ROUNDS = 3  # before whole cells are cut
TRYING = 1 / (1 + LEAST_ROUNDS)  # of max_seconds: what is left is enough for so many rounds
WARM_QUERIES = 64  # smaller batches are tried warm: how long a cold call takes says little
BATCHED = 8  # times as fast a query as in a smaller batch, at best
# Seconds before each turn: idle threads of BLAS and OpenMP go on spinning for some milliseconds
# after a search, and would take time from whoever is next.
PAUSE = 0.1
LATE = 1.5  # times max_seconds, after which no further round begins


@dataclass
class Plan:
    """Calls a round of each cell that is measured, the rounds, and what was cut for time."""

    calls: dict[Cell, int]
    rounds: int
    cut: list[Cell] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


@dataclass
class Times:
    """Seconds of every call, round by round, by contender (its label) and cell."""

    rounds: dict[tuple[str, Cell], list[list[float]]]
    notes: list[str]
    interrupted: bool = False


@dataclass
class Interrupt:
    """Whether Ctrl-C was pressed."""

    asked: bool = False

    def remember(self, number: int, frame: FrameType | None) -> None:
        """The signal handler; a second signal does not wait."""
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True
        log.warning("stopping after this call; what was measured is reported")


@contextmanager
def stop_after_call() -> Iterator[Interrupt]:
    """Within it, Ctrl-C is remembered: FAISS would turn it into an error of its own."""
    interrupt = Interrupt()
    if threading.current_thread() is not threading.main_thread():
        yield interrupt
        return
    before = signal.signal(signal.SIGINT, interrupt.remember)
    try:
        yield interrupt
    finally:
        signal.signal(signal.SIGINT, before)


def cells_of(config: BenchmarkConfig) -> list[Cell]:
    """Every number of queries with every number of results, the cheapest first."""
    return [Cell(size, k) for size in sorted(set(config.queries)) for k in config.k_values]


def measure(
    contenders: Sequence[Contender],
    queries: FloatArray,
    config: BenchmarkConfig,
    between: Callable[[], None],
) -> Times:
    """Try every cell once, plan what fits the time, and measure it; `between` runs every round.

    Raises:
        KeyboardInterrupt: Ctrl-C before anything was measured.
    """
    if not contenders:
        return Times({}, [])
    started = time.perf_counter()
    with stop_after_call() as interrupt:
        seconds, cut = try_cells(contenders, queries, config, interrupt)
        left = budget(config) - (time.perf_counter() - started)
        plan = make_plan(seconds, config, left, len(contenders))
        if plan.cut or cut:
            names = cells_text([*plan.cut, *cut])
            plan.notes.append(
                f"not measured, for benchmark.max_seconds={config.max_seconds:g}: {names}"
            )
        deadline = started + LATE * budget(config)
        return run_rounds(contenders, queries, plan, deadline, between, interrupt)


def budget(config: BenchmarkConfig) -> float:
    """Seconds that timing may take."""
    return config.max_seconds or math.inf


def try_cells(
    contenders: Sequence[Contender],
    queries: FloatArray,
    config: BenchmarkConfig,
    interrupt: Interrupt,
) -> tuple[dict[Cell, float], list[Cell]]:
    """The seconds of one call of every contender together, by cell, and the cells that are cut.

    A cell is cut whose trial takes too long, or would by what one with fewer queries took.
    """
    started = time.perf_counter()
    seconds: dict[Cell, float] = {}
    cut: list[Cell] = []
    with progress("trying", len(cells_of(config)), "batches") as bar:
        for cell in cells_of(config):
            left = TRYING * budget(config) - (time.perf_counter() - started)
            took = None
            if not seconds:  # one is measured in any case
                took = _try_cell(contenders, cell, queries, interrupt, math.inf)
            elif _expected(seconds, cell) <= left:
                took = _try_cell(contenders, cell, queries, interrupt, left)
            if took is None:
                cut.append(cell)
            else:
                seconds[cell] = took
            bar.advance(1, str(cell))
    return seconds, cut


def _try_cell(
    contenders: Sequence[Contender],
    cell: Cell,
    queries: FloatArray,
    interrupt: Interrupt,
    limit: float,
) -> float | None:
    """The seconds of one call of every contender together; None if there is no time for all."""
    started, total = time.perf_counter(), 0.0
    batch = np.resize(queries, (cell.queries, queries.shape[1]))
    for contender in contenders:
        if total and time.perf_counter() - started > limit:
            return None
        contender.prepare(cell, batch)
        total += _time_calls(contender, cell, batch, 0, 1, warm=cell.queries < WARM_QUERIES)[0]
        if interrupt.asked:
            raise KeyboardInterrupt
    return total


def _expected(seconds: Mapping[Cell, float], cell: Cell) -> float:
    """What a cell takes, by the last one that was tried, if its queries are much faster each."""
    last, took = list(seconds.items())[-1]
    return took * max(1.0, cell.queries / last.queries / BATCHED)


def make_plan(
    seconds: Mapping[Cell, float], config: BenchmarkConfig, left: float, turns: int
) -> Plan:
    """The calls and rounds that fit into the seconds `left`: fewer calls first, then fewer rounds.

    A cell takes `seconds` for a call of each contender, and `turns` pauses in a round.
    Where three rounds of one call do not fit, the dearest cells are cut, but never all of them.
    """
    least = -(-LEAST_CALLS // config.rounds)
    full = {cell: max(CALLS // cell.queries, least) for cell in seconds}
    plan = Plan(dict(full), config.rounds)

    def a_round() -> float:
        # A call before the timed ones, where there are several, brings data into the caches.
        calls = sum(seconds[cell] * (count + (count > 1)) for cell, count in plan.calls.items())
        return calls + PAUSE * turns * len(plan.calls)

    while a_round() * plan.rounds > left and max(plan.calls.values()) > 1:
        plan.calls = {cell: max(1, 3 * count // 4) for cell, count in plan.calls.items()}
    fewest = min(LEAST_ROUNDS, config.rounds)
    while len(plan.calls) > 1 and a_round() * fewest > left:
        dearest = max(plan.calls, key=lambda cell: seconds[cell])
        del plan.calls[dearest]
        plan.cut.append(dearest)
    if a_round() * plan.rounds > left:
        plan.rounds = max(1, int(left / a_round()))
        plan.notes.append(f"{plan.rounds} of {config.rounds} rounds fit into the time")
    if fewer := [cell for cell, count in plan.calls.items() if count < full[cell]]:
        plan.notes.append(
            f"fewer calls, for time, at {cells_text(fewer)}: their p95 is nearly the maximum"
        )
    return plan


def run_rounds(
    contenders: Sequence[Contender],
    queries: FloatArray,
    plan: Plan,
    deadline: float,
    between: Callable[[], None],
    interrupt: Interrupt,
) -> Times:
    """Measure what was planned; Ctrl-C ends it after the call that runs.

    Their order is drawn anew for every round and cell, so whom a contender follows changes.
    """
    times = Times(
        {(label(one), cell): [] for cell in plan.calls for one in contenders}, list(plan.notes)
    )
    with progress("benchmark", plan.rounds * len(times.rounds), "turns") as bar:
        for turn in range(plan.rounds):
            if turn and time.perf_counter() > deadline:
                times.notes.append(f"stopped after {turn} of {plan.rounds} rounds, for time")
                break
            between()
            for cell, calls in plan.calls.items():
                for one in drawn_order(contenders, cell, turn):
                    time.sleep(PAUSE)
                    seconds = _time_calls(one, cell, queries, turn, calls, warm=calls > 1)
                    times.rounds[label(one), cell].append(seconds)
                    bar.advance(1, f"{cell} {label(one)}")
                    if interrupt.asked:
                        times.interrupted = True
                        times.notes.append(
                            f"stopped in round {turn + 1} of {plan.rounds} by Ctrl-C"
                        )
                        return times
    return times


def drawn_order(contenders: Sequence[Contender], cell: Cell, turn: int) -> list[Contender]:
    """All contenders, in the same order whenever the round and the cell are the same."""
    drawn = np.random.default_rng([turn, cell.queries, cell.k]).permutation(len(contenders))
    return [contenders[place] for place in drawn]


def _time_calls(
    contender: Contender, cell: Cell, queries: FloatArray, turn: int, calls: int, warm: bool
) -> list[float]:
    """Seconds of each call, on batches that follow one another through the queries."""
    seconds = []
    with contender.ready(cell):
        if warm:  # its data into the caches again
            contender.index.search(np.resize(queries, (cell.queries, queries.shape[1])), cell.k)
        for call in range(calls):
            first = (turn * calls + call) * cell.queries
            batch = queries[np.arange(first, first + cell.queries) % len(queries)]
            started = time.perf_counter()
            contender.index.search(batch, cell.k)
            seconds.append(time.perf_counter() - started)
    return seconds
