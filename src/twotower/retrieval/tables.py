"""Tables on stdout that fit a terminal, and are whole where there is none."""

from __future__ import annotations

import io

from rich.console import Console
from rich.measure import Measurement
from rich.table import Table

from twotower.console import output, say


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
