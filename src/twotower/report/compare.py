"""`twotower compare`: every run's measured retrieval in one table, as text and as Markdown."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

from rich.table import Table

from twotower.config import Config, ConfigError
from twotower.console import print_table, say
from twotower.metrics import KS

log = logging.getLogger(__name__)

DIRECTIONS = {"text_to_image": "t->i", "image_to_text": "i->t"}
HEADINGS = (
    "run",
    "variant",
    "parameters",
    *(f"{short} R@{k}" for short in DIRECTIONS.values() for k in KS),
    "seconds",
)


@dataclass(frozen=True)
class Entry:
    """One measurement of one run, as `twotower evaluate` wrote it."""

    run: str
    report: dict[str, Any]

    @property
    def where(self) -> str:
        """What was measured on; only entries of the same are comparable."""
        report = self.report
        images, captions = report["images"], report["captions"]
        return f"{report['data']}/{report['split']}: {images:,} images, {captions:,} captions"

    @property
    def mean_recall(self) -> float:
        """What the table is sorted by."""
        return float(self.report["metrics"]["mean_recall"])

    def cells(self) -> list[str]:
        """The row of the table, under `HEADINGS`."""
        report = self.report
        recalls = [self._recall(f"{way}_R@{k}") for way in DIRECTIONS for k in KS]
        seconds = f"{report['train_seconds']:.0f}"
        size = f"{report['parameters'] / 1e6:.1f} M"
        return [self.run, report["variant"], size, *recalls, seconds]

    def _recall(self, name: str) -> str:
        value = f"{self.report['metrics'][name]:.1f}"
        interval = self.report["intervals"].get(name)
        return f"{value} [{interval[0]:.0f}, {interval[1]:.0f}]" if interval else value


def read_entries(logs: Path, runs: Iterable[str] = ()) -> list[Entry]:
    """All measurements under a logs folder, the best first within what they were measured on.

    Raises:
        ConfigError: there are none, or a named run has none.
    """
    wanted = set(runs)
    files = sorted(logs.glob("*/evaluate/*.json"))
    entries = [Entry(file.parent.parent.name, json.loads(file.read_text())) for file in files]
    missing = wanted - {entry.run for entry in entries}
    if missing or not entries:
        what = ", ".join(sorted(missing)) or "any run"
        raise ConfigError(
            f"no measurement of {what} in {logs}; run `twotower evaluate` on it first"
        )
    chosen = [entry for entry in entries if not wanted or entry.run in wanted]
    return sorted(chosen, key=lambda entry: (entry.where, -entry.mean_recall))


def text_table(where: str, entries: Iterable[Entry]) -> Table:
    """A table for the terminal, of what was measured on the same images."""
    table = Table(title=where, title_justify="left")
    for index, heading in enumerate(HEADINGS):
        table.add_column(heading, justify="left" if index < 2 else "right")
    for entry in entries:
        table.add_row(*entry.cells())
    return table


def markdown_table(where: str, entries: Iterable[Entry]) -> str:
    """The same as Markdown."""
    lines = [f"### {where}", "", "| " + " | ".join(HEADINGS) + " |"]
    lines.append("|" + " --- |" * len(HEADINGS))
    lines += ["| " + " | ".join(entry.cells()) + " |" for entry in entries]
    return "\n".join(lines) + "\n"


def best_checkpoints(entries: Iterable[Entry]) -> dict[str, str]:
    """The checkpoint of the best mean recall on each `<data>/<split>`."""
    best: dict[str, Entry] = {}
    for entry in entries:
        where = f"{entry.report['data']}/{entry.report['split']}"
        if where not in best or entry.mean_recall > best[where].mean_recall:
            best[where] = entry
    return {where: str(entry.report["checkpoint"]) for where, entry in best.items()}


def compare(config: Config) -> None:
    """Print the table and write `logs/comparison.md` and `logs/comparison.json`.

    Raises:
        ConfigError: as `read_entries`.
    """
    logs = Path(config.run.logs_dir)
    entries = read_entries(logs, config.report.runs)
    tables = {where: list(group) for where, group in groupby(entries, lambda entry: entry.where)}
    for where, group in tables.items():
        print_table(text_table(where, group))
    say("Recalls in percent; brackets are 95 % bootstrap intervals over images.")
    path = logs / "comparison.md"
    markdown = "\n".join(markdown_table(where, group) for where, group in tables.items())
    path.write_text(markdown, encoding="utf-8")
    found = {"best": best_checkpoints(entries), "runs": [e.report for e in entries]}
    path.with_suffix(".json").write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    log.info("written to %s", path)
