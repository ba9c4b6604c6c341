"""A benchmark beside an earlier one: what is slower by more than the noise of the rounds."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.table import Table
from rich.text import Text

from twotower.console import print_table, say
from twotower.retrieval.benchmark.limits import Rates
from twotower.retrieval.benchmark.measurement import Measurement, Results
from twotower.settings import ConfigError

log = logging.getLogger(__name__)

# Where these differ, so may the speed.
SAME = (
    *("processor", "cores", "exact", "torch", "torch_threads", "numpy", "numpy_blas"),
    *("OMP_NUM_THREADS", "faiss", "faiss_threads", "faiss_compile_options"),
    *("data", "rows", "dim", "metric", "timed_queries", "seed"),
)
LEAST_ROUNDS = 3  # of each side, to know their noise
LEAST_CHANGE = 0.03  # smaller ones are not marked, however still the machine was
RECALL_CHANGE = 0.0005


@dataclass(frozen=True)
class Change:
    """One row beside the earlier one.

    `ratio` is the new speed over the old one, by the medians of all calls; `low` and `high` are its
    least and its largest over the medians of the rounds. `mark` is `slower`, `faster`, `recall`
    (which has fallen) or empty.
    """

    label: str
    queries: int
    k: int
    ratio: float
    low: float
    high: float
    mark: str


def read(file: Path) -> Results:
    """The results that `report` wrote.

    Raises:
        ConfigError: there is no such file, or it is not one of this version's.
    """
    try:
        lines = [json.loads(line) for line in file.read_text().splitlines()]
        kinds: dict[str, list[dict[str, Any]]] = {}
        for line in lines:
            kinds.setdefault(line.pop("kind"), []).append(line)
        return Results(
            kinds["environment"][0],
            Rates(**kinds["limits"][0]) if "limits" in kinds else None,
            [Measurement(**row) for row in kinds["measurement"]],
            [line["text"] for line in kinds.get("note", [])],
        )
    except OSError as error:
        raise ConfigError(f"benchmark.compare cannot read {file}: {error.strerror}") from error
    except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
        raise ConfigError(
            f"benchmark.compare takes a benchmark.jsonl that this version wrote, and {file} is none"
        ) from error


def changes(old: Results, new: Results) -> list[Change]:
    """What both measured, in the order of the new."""
    before = {(row.label, row.cell): row for row in old.rows if row.p50_ms}
    return [
        _change(before[row.label, row.cell], row)
        for row in new.rows
        if row.p50_ms and (row.label, row.cell) in before
    ]


def lost(old: Results, new: Results) -> list[str]:
    """The rows that the old measured and the new did not, in words."""
    there = {(row.label, row.cell) for row in new.rows if row.p50_ms}
    return [
        f"{row.label} at {row.cell}"
        for row in old.rows
        if row.p50_ms and (row.label, row.cell) not in there
    ]


def _change(old: Measurement, new: Measurement) -> Change:
    assert old.p50_ms and new.p50_ms
    ratio = old.p50_ms / new.p50_ms
    low = min(old.round_ms) / max(new.round_ms)
    high = max(old.round_ms) / min(new.round_ms)
    enough = min(len(old.round_ms), len(new.round_ms)) >= LEAST_ROUNDS
    mark = ""
    if _recall_fell(old, new):
        mark = "recall"
    elif enough and high < 1 and ratio < 1 - LEAST_CHANGE:
        mark = "slower"
    elif enough and low > 1 and ratio > 1 + LEAST_CHANGE:
        mark = "faster"
    return Change(new.label, new.queries, new.k, ratio, low, high, mark)


def _recall_fell(old: Measurement, new: Measurement) -> bool:
    pairs = ((old.text_recall, new.text_recall), (old.image_recall, new.image_recall))
    return any(
        was is not None and now is not None and now < was - RECALL_CHANGE for was, now in pairs
    )


def differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """What of the machine, the libraries and the data is not as it was, in words."""
    return [
        f"{name}: {old.get(name, 'unknown')} then, {new.get(name, 'unknown')} now"
        for name in SAME
        if old.get(name) != new.get(name)
    ]


def report(old: Results, new: Results, found: Sequence[Change]) -> None:
    """Print the ratios, and warn of what else has changed."""
    for text in differences(old.about, new.about):
        log.warning("not as in the earlier benchmark, which may explain a change: %s", text)
    say()
    table = Table(box=None, pad_edge=False, title="new speed / old speed", title_justify="left")
    for heading in ("index", "Q", "k", "ratio", "rounds", "mark"):
        table.add_column(heading, justify="left" if heading in ("index", "mark") else "right")
    for name in Rates._fields:
        then, now = (getattr(side.rates, name, None) for side in (old, new))
        if then and now:
            table.add_row(Text(f"(machine: {name})"), "", "", f"{now / then:.2f}", "", "")
    for row in found:
        between = f"{row.low:.2f} - {row.high:.2f}"
        words = (row.label, str(row.queries), str(row.k), f"{row.ratio:.2f}", between, row.mark)
        table.add_row(*(Text(word) for word in words))
    print_table(table)
    say(summary(old, new, found))


def summary(old: Results, new: Results, found: Sequence[Change]) -> str:
    """How many rows are marked, and how many have no counterpart."""
    counts = {mark: sum(row.mark == mark for row in found) for mark in ("slower", "faster")}
    fell = sum(row.mark == "recall" for row in found)
    left = len({(row.label, row.cell) for row in [*old.rows, *new.rows] if row.p50_ms}) - len(found)
    return (
        f"of {len(found)} rows {counts['slower']} are slower and {counts['faster']} faster by more "
        f"than the noise of their rounds, {fell} find less; {left} have no counterpart"
    )


def refuse_slower(found: Sequence[Change], gone: Sequence[str], fail_below: float) -> None:
    """Fail where a marked row is below the share of its earlier speed, finds less, or is `gone`.

    Raises:
        ConfigError: there are such rows, and `fail_below` is set.
    """
    if not fail_below:
        return
    failures = []
    bad = [row for row in found if row.mark == "recall"]
    bad += [row for row in found if row.mark == "slower" and row.ratio < fail_below]
    if bad:
        worst = min(bad, key=lambda row: row.ratio)
        failures.append(
            f"{len(bad)} of {len(found)} rows are below benchmark.fail_below={fail_below:g} of "
            f"their earlier speed, or find less; the slowest is {worst.label} at Q={worst.queries} "
            f"k={worst.k}, {worst.ratio:.2f}"
        )
    if gone:
        failures.append(
            f"{len(gone)} rows of the earlier benchmark were not measured, which "
            f"benchmark.fail_below counts as failures; the first is {gone[0]}; measure the same "
            "indexes and batch sizes, with a larger benchmark.max_seconds where they were cut"
        )
    if failures:
        raise ConfigError("; and ".join(failures))
