"""`twotower compare`: every run's measured retrieval in one table, as text and as Markdown."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.table import Table

from twotower.config import Config, ConfigError
from twotower.console import output
from twotower.metrics import KS

log = logging.getLogger(__name__)

DIRECTIONS = {"text_to_image": "text->image", "image_to_text": "image->text"}
HEADINGS = (
    "variant",
    "parameters",
    "measured on",
    *(f"{short} R@{k} %" for short in DIRECTIONS.values() for k in KS),
    "seconds",
)


@dataclass(frozen=True)
class Entry:
    """One measurement of one run, as `twotower evaluate` wrote it."""

    run: str
    report: dict[str, Any]

    @property
    def mean_recall(self) -> float:
        """What the table is sorted by."""
        return float(self.report["metrics"]["mean_recall"])

    def cells(self) -> list[str]:
        """The row of the table, under `HEADINGS`."""
        report = self.report
        recalls = [self._recall(f"{way}_R@{k}") for way in DIRECTIONS for k in KS]
        where = f"{report['images']} {report['data']}/{report['split']} images"
        seconds = f"{report['train_seconds']:.0f}"
        return [report["variant"], f"{report['parameters'] / 1e6:.1f} M", where, *recalls, seconds]

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
    return sorted(
        chosen,
        key=lambda e: (e.report["data"], e.report["images"], e.report["split"], -e.mean_recall),
    )


def text_table(entries: Iterable[Entry]) -> Table:
    """The table for the terminal."""
    table = Table(title="brackets: 95 % bootstrap interval over images", title_justify="left")
    for index, heading in enumerate(HEADINGS):
        table.add_column(heading, justify="left" if index in (0, 2) else "right")
    for entry in entries:
        table.add_row(*entry.cells())
    return table


def markdown_table(entries: Iterable[Entry]) -> str:
    """The same as Markdown."""
    lines = ["| " + " | ".join(HEADINGS) + " |", "|" + " --- |" * len(HEADINGS)]
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
    output.print(text_table(entries), soft_wrap=True)
    path = logs / "comparison.md"
    path.write_text(markdown_table(entries), encoding="utf-8")
    found = {"best": best_checkpoints(entries), "runs": [e.report for e in entries]}
    path.with_suffix(".json").write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    log.info("written to %s", path)
