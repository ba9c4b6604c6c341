"""`twotower benchmark`: build what takes part, measure it in rounds, and report."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Mapping
from pathlib import Path

import torch

from twotower.benchmark_config import QueryKind
from twotower.config import Config
from twotower.console import progress
from twotower.retrieval.benchmark import compare
from twotower.retrieval.benchmark.building import Built, build_all, open_saved
from twotower.retrieval.benchmark.contenders import Cell, Contender, Plain, contenders_of, label
from twotower.retrieval.benchmark.data import Data, draw_queries, open_data, timed_kind
from twotower.retrieval.benchmark.limits import Limits, Rates
from twotower.retrieval.benchmark.measurement import Measurement, Results, measured, not_measured
from twotower.retrieval.benchmark.other_load import OtherLoad
from twotower.retrieval.benchmark.recall import Truth
from twotower.retrieval.benchmark.report import report
from twotower.retrieval.benchmark.rounds import Times, cells_of, measure
from twotower.retrieval.environment import environment
from twotower.runs import logs_path

BUSY = 0.1  # share of the cores' time that others use, from which on the figures are in doubt

log = logging.getLogger(__name__)


def benchmark(config: Config, compare_with: str = "") -> None:
    """Measure the indexes of the benchmark section; print and write tables and plots.

    With the benchmark.jsonl of an earlier run, print also what has become slower.

    Raises:
        ConfigError: the store is missing, k is beyond its rows, or rows fail `fail_below`.
        KeyboardInterrupt: Ctrl-C, after what was measured is reported.
    """
    if config.distributed.num_threads:
        torch.set_num_threads(config.distributed.num_threads)
    section = config.benchmark
    earlier = compare.read(Path(compare_with)) if compare_with else None
    results, interrupted = run(config, open_data(config))
    folder = Path(section.output or logs_path(config) / "benchmark")
    report(results, folder)
    changes = compare.changes(earlier, results) if earlier else []
    if earlier:
        compare.report(earlier, results, changes)
    if interrupted:
        raise KeyboardInterrupt
    gone = compare.lost(earlier, results) if earlier else []
    compare.refuse_slower(changes, gone, section.fail_below)


def run(config: Config, data: Data) -> tuple[Results, bool]:
    """All figures, and whether Ctrl-C cut the rounds short."""
    section = config.benchmark
    queries = draw_queries(data, section, config.seed)
    kind = timed_kind(queries, section.timed)
    about = {
        **data.about(),
        "rows": data.count,
        "dim": data.dim,
        "metric": config.index.metric.name,
        "timed_queries": f"{len(queries[kind].vectors)} {queries[kind].what}",
        "seed": config.seed,
        **environment(),
    }
    saved = open_saved(section.saved, config.index, data, section.indexes)
    exact, built, notes = build_all(section.indexes, config.index, data, config.seed)
    contenders = {
        name: contenders_of(name, built[name].index, section) if name in built else []
        for name in dict.fromkeys(section.indexes)
    }
    contenders.update({name: [Plain(name, each.index)] for name, each in saved.items()})
    built.update(saved)
    everyone = [one for group in contenders.values() for one in group]
    truths = {each: Truth(exact, found, section.recall_queries) for each, found in queries.items()}
    recalls = _recalls(everyone, truths, section.k_values)
    limits = Limits()
    others = OtherLoad()
    times = measure(everyone, queries[kind].vectors, section, limits.measure)
    about["other_load"] = others.share()
    rates = limits.median()
    rows = [
        row
        for cell in dict.fromkeys(cell for _, cell in times.rounds) or cells_of(section)
        for name, group in contenders.items()
        for row in _rows_of(name, group, cell, built, notes, recalls, times, rates)
    ]
    compared = {each.name: len(truth.queries.vectors) for each, truth in truths.items()}
    about["recall_queries"] = ", ".join(f"{count} {each}" for each, count in compared.items())
    said = [*times.notes, *busy(about["other_load"])]
    return Results(about, rates, rows, said), times.interrupted


def busy(share: float | None) -> list[str]:
    """What to say of other processes."""
    if share is None or share < BUSY:
        return []
    text = (
        f"other processes used {share:.0%} of the cores meanwhile: measure again on a quiet machine"
    )
    log.warning("%s", text)
    return [text]


def _recalls(
    contenders: list[Contender], truths: Mapping[QueryKind, Truth], k_values: list[int]
) -> dict[tuple[str, QueryKind, int], float]:
    """By contender, kind of query and k; once an index, however its threads are set."""
    found: dict[tuple[str, QueryKind, int], float] = {}
    todo = list(itertools.product(contenders, truths.items(), k_values))
    with progress("recall", len(todo), "answers") as bar:
        for one, (kind, truth), k in todo:
            same = found.get((one.name, kind, k)) if one.setting == "tuned" else None
            if same is None:
                with one.ready(Cell(1, k)):
                    same = truth.recall(one.index, k)
            found[label(one), kind, k] = same
            bar.advance(1, f"{label(one)}, {kind.name} queries, k={k}")
    return found


def _rows_of(
    name: str,
    group: list[Contender],
    cell: Cell,
    built: Mapping[str, Built],
    notes: Mapping[str, str],
    recalls: Mapping[tuple[str, QueryKind, int], float],
    times: Times,
    rates: Rates | None,
) -> list[Measurement]:
    if not group:
        return [not_measured(name, cell, notes[name])]
    return [
        measured(
            one,
            cell,
            built[name],
            {kind: recalls.get((label(one), kind, cell.k)) for kind in QueryKind},
            times.rounds[label(one), cell],
            rates,
        )
        for one in group
    ]
