"""What the user sees: logs and progress on stderr, with rate and estimate; results on stdout."""

from __future__ import annotations

import io
import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.measure import Measurement
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

console = Console(stderr=True, highlight=False, emoji=False)
log = logging.getLogger(__name__)

SECONDS_BETWEEN_LINES = 10.0


class ConsoleHandler(logging.Handler):
    """A log handler that prints above a running progress bar instead of through it."""

    def emit(self, record: logging.LogRecord) -> None:
        try:
            console.print(self.format(record), markup=False, soft_wrap=True)
        except Exception:
            self.handleError(record)


class ProgressLine:
    """Counts what is done; shows a bar on a terminal and a log line every ten seconds elsewhere."""

    def __init__(self, what: str, total: int, unit: str, bar: Progress | None) -> None:
        self._what, self._total, self._unit, self._bar = what, total, unit, bar
        self._start = self._last_line = time.monotonic()
        self._done = self._skipped = 0
        self._task = None if bar is None else bar.add_task(what, total=total, note="")

    def skip(self, count: int) -> None:
        """Count work that an earlier run has done: it moves the bar and not the rate."""
        self._done += count
        self._skipped += count
        self._show("")

    def advance(self, count: int = 1, note: str = "") -> None:
        """Count `count` more units as done and show `note` (a loss, say) beside the rate."""
        self._done += count
        self._show(note)

    @property
    def rate(self) -> float:
        """Units a second since the start."""
        return (self._done - self._skipped) / max(time.monotonic() - self._start, 1e-9)

    def _show(self, note: str) -> None:
        rate = self.rate
        text = f"{rate:,.1f} {self._unit}/s  {note}" if rate else note
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, completed=self._done, note=text)
            return
        now = time.monotonic()
        if now - self._last_line >= SECONDS_BETWEEN_LINES and self._done < self._total:
            self._last_line = now
            left = (self._total - self._done) / rate if rate else float("inf")
            log.info(
                "%s: %d of %d, %s %.0f s left", self._what, self._done, self._total, text, left
            )


@contextmanager
def progress(what: str, total: int, unit: str, show: bool = True) -> Iterator[ProgressLine]:
    """Show the progress of `total` units of work; `show=False` counts in silence (other ranks)."""
    if not show or not console.is_terminal:
        line = ProgressLine(what, total, unit, None)
        if not show:
            line._last_line = float("inf")
        yield line
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TextColumn("{task.fields[note]}"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console) as bar:
        yield ProgressLine(what, total, unit, bar)


output = Console(highlight=False, emoji=False)


def say(text: str = "") -> None:
    """Print a result on stdout as it is: no markup, no emoji codes, no wrapping, tabs kept."""
    output.file.write(text + "\n")


def print_table(table: Table) -> None:
    """Print a table as wide as the terminal; in a pipe or a file one line a row, nothing cut."""
    if output.is_terminal:
        output.print(table)
        return
    unlimited = output.options.update(max_width=1_000_000)
    width = Measurement.get(output, unlimited, table).maximum
    wide = Console(file=io.StringIO(), width=width, highlight=False)
    with wide.capture() as captured:
        wide.print(table)
    for line in captured.get().splitlines():
        say(line.rstrip())
