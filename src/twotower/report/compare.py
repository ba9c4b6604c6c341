"""`twotower compare`: every run's measured retrieval in one table, as text and as Markdown."""

from __future__ import annotations

import json
import logging
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

from rich.table import Table

from twotower.checkpoint.atomic import replacing
from twotower.config import Config
from twotower.console import print_table, say
from twotower.metrics import KS
from twotower.settings import ConfigError

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
    """One measurement of one run, as `twotower evaluate` wrote it.

    Attributes:
        written: when its file was written, in seconds since the epoch.
    """

    run: str
    report: dict[str, Any]
    written: float = 0.0

    @property
    def split(self) -> str:
        """`<data>/<split>`."""
        return f"{self.report['data']}/{self.report['split']}"

    @property
    def fingerprint(self) -> str:
        """Tells images and captions of one name from others; empty in a report without it."""
        return str(self.report.get("data_fingerprint", ""))

    @property
    def where(self) -> str:
        """What was measured on; only entries of the same and of one fingerprint are comparable."""
        images, captions = self.report["images"], self.report["captions"]
        return f"{self.split}: {images:,} images, {captions:,} captions"

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


def read_entry(file: Path) -> Entry | None:
    """The measured retrieval in a file; None without any, or, with a warning, if it is damaged."""
    try:
        report = json.loads(file.read_text(encoding="utf-8"))
        if "zeroshot" in report and "metrics" not in report:
            return None
        entry = Entry(file.parent.parent.name, report, file.stat().st_mtime)
        entry.cells()
        _ = (entry.where, entry.mean_recall, report["checkpoint"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        log.warning("%s is left out: it is no whole report (%s)", file, type(error).__name__)
        return None
    return entry


def read_entries(logs: Path, runs: Iterable[str] = ()) -> list[Entry]:
    """All measurements under a logs folder, the best first within what they were measured on.

    A damaged file is left out with a warning.

    Raises:
        ConfigError: there are none, or a named run has none.
    """
    wanted = set(runs)
    files = sorted(logs.glob("*/evaluate/*.json"))
    entries = [entry for file in files if (entry := read_entry(file)) is not None]
    missing = wanted - {entry.run for entry in entries}
    if missing or not entries:
        what = ", ".join(sorted(missing)) or "any run"
        raise ConfigError(
            f"no measurement of {what} in {logs}; run `twotower evaluate` on it first"
        )
    chosen = [entry for entry in entries if not wanted or entry.run in wanted]
    return sorted(chosen, key=lambda e: (e.where, e.fingerprint, -e.mean_recall))


def grouped(entries: Iterable[Entry]) -> list[tuple[str, list[Entry]]]:
    """The tables: what was measured on, and its entries, in the order of `read_entries`.

    Different data under one name (two manifests, say) have a table each, titled by fingerprint.
    """
    groups = [
        (where, fingerprint, list(group))
        for (where, fingerprint), group in groupby(entries, lambda e: (e.where, e.fingerprint))
    ]
    names = Counter(where for where, _, _ in groups)
    return [
        (f"{where} ({fingerprint or 'no fingerprint'})" if names[where] > 1 else where, group)
        for where, fingerprint, group in groups
    ]


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
    """The checkpoint of the best mean recall on each `<data>/<split>`.

    Only what was measured on all images of the split counts, and only checkpoints that are there.
    Of different data under one name, those that were measured last count.
    """
    splits: dict[str, list[Entry]] = {}
    for entry in entries:
        whole = not entry.report.get("max_images", 0)
        if whole and Path(entry.report["checkpoint"]).is_file():
            splits.setdefault(entry.split, []).append(entry)
    best = {}
    for split, group in splits.items():
        newest = max(group, key=lambda e: e.written)
        same = [e for e in group if (e.where, e.fingerprint) == (newest.where, newest.fingerprint)]
        best[split] = str(max(same, key=lambda e: e.mean_recall).report["checkpoint"])
    return best


def compare(config: Config) -> None:
    """Print the table and write `logs/comparison.md` and `logs/comparison.json`.

    Raises:
        ConfigError: as `read_entries`, or the folder cannot be written.
    """
    logs = Path(config.run.logs_dir)
    entries = read_entries(logs, config.report.runs)
    tables = grouped(entries)
    for where, group in tables:
        print_table(text_table(where, group))
    say("Recalls in percent; brackets are 95 % bootstrap intervals over images.")
    path = logs / "comparison.md"
    with replacing(path) as temporary:
        markdown = "\n".join(markdown_table(where, group) for where, group in tables)
        temporary.write_text(markdown, encoding="utf-8")
    found = {"best": best_checkpoints(entries), "runs": [e.report for e in entries]}
    with replacing(path.with_suffix(".json")) as temporary:
        temporary.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    log.info("written to %s", path)
