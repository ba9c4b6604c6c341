"""A benchmark's figures as the user gets them: tables, JSON lines, Markdown and plots."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from rich.table import Table
from rich.text import Text

from twotower.checkpoint.atomic import replacing
from twotower.console import print_table, say
from twotower.retrieval.benchmark.contenders import Cell, cells_text
from twotower.retrieval.benchmark.limits import Rates
from twotower.retrieval.benchmark.measurement import Measurement, Results, on_front
from twotower.retrieval.benchmark.plots import plot_bars, plot_bytes, plot_recall

FRONT = "*"
KEY = (
    f"{FRONT}: on the front, where no other is both faster and of higher recall; share: of what "
    "this machine reads (read) or multiplies (arith) at best, measured in the same rounds with "
    "torch and numpy; above 1 where a kernel beats theirs, or the rows fit into the cache"
)


class Sheet(NamedTuple):
    """A table with its title; the first columns, of words, stand to the left."""

    title: str
    headings: list[str]
    rows: list[list[str]]
    words: int = 1


def report(results: Results, folder: Path) -> None:
    """Print everything; write benchmark.jsonl, benchmark.md and three plots.

    Raises:
        ConfigError: the folder cannot be written.
    """
    for key, value in results.about.items():
        say(f"{key}: {value}")
    for sheet in sheets(results):
        say()
        print_sheet(sheet)
    say()
    for note in notes(results):
        say(note)
    with replacing(folder / "benchmark.jsonl") as temporary:
        temporary.write_text("".join(json.dumps(line) + "\n" for line in json_lines(results)))
    with replacing(folder / "benchmark.md") as temporary:
        temporary.write_text(markdown(results))
    names = ["benchmark.jsonl", "benchmark.md"]
    plots = {
        "benchmark.png": plot_bars,
        "benchmark_recall.png": plot_recall,
        "benchmark_bytes.png": plot_bytes,
    }
    for name, plot in plots.items():
        with replacing(folder / name) as temporary:
            plot(results, temporary)
    for name in [*names, *plots]:
        say(str(folder / name))


def json_lines(results: Results) -> Iterator[dict[str, Any]]:
    """The environment, the machine's limits, notes, and the measurements."""
    yield {"kind": "environment", **results.about}
    if results.rates:
        yield {"kind": "limits", **results.rates._asdict()}
    for text in results.notes:
        yield {"kind": "note", "text": text}
    for row in results.rows:
        yield {"kind": "measurement", **dataclasses.asdict(row)}


def sheets(results: Results) -> Iterator[Sheet]:
    """The indexes, then the figures, a table for each number of results."""
    first = {row.index: row for row in reversed(results.rows)}
    yield Sheet(
        f"{results.about['rows']:,} rows of dimension {results.about['dim']}",
        ["index", "build s", "bytes/vector"],
        [
            [name, shown(row.build_seconds, ".2f"), shown(row.bytes_per_vector, ",.0f")]
            for name, row in reversed(first.items())
        ],
    )
    front = on_front(results.rows)
    for k in sorted({row.k for row in results.rows}):
        yield Sheet(
            f"k={k}, timed with {results.about['timed_queries']}",
            [
                *("index", "setting", "Q", "queries/s", "p50 ms", "p95 ms"),
                *(f"text R@{k}", f"image R@{k}", "share", "front"),
            ],
            [cells(row, front) for row in results.rows if row.k == k and row.calls],
            words=2,
        )


def cells(row: Measurement, front: set[tuple[str, Cell]]) -> list[str]:
    """One measurement as the columns of its table; a dash where there is no figure."""
    share = row.share
    return [
        row.index,
        row.setting,
        str(row.queries),
        shown(row.queries_per_second, ",.0f"),
        shown(row.p50_ms, ".3f"),
        shown(row.p95_ms, ".3f"),
        shown(row.text_recall, ".4f"),
        shown(row.image_recall, ".4f"),
        f"{share[0]:.2f} {share[1]}" if share else "-",
        FRONT if (row.label, row.cell) in front else "",
    ]


def shown(value: float | None, form: str) -> str:
    """A figure, or a dash."""
    return "-" if value is None else format(value, form)


def notes(results: Results) -> list[str]:
    """Which is how much faster, the limits, the calls, what was cut or could not be measured."""
    found = [*headlines(results.rows), KEY]
    if results.rates:
        found.append(f"limits of this machine: {rates_text(results.rates)}")
    calls: dict[int, set[Cell]] = {}
    tuned: dict[str, set[Cell]] = {}
    for row in results.rows:
        if row.calls:
            calls.setdefault(row.calls, set()).add(row.cell)
        if row.chosen:
            tuned.setdefault(f"{row.label}: {row.chosen}", set()).add(row.cell)
    found += [f"timed calls: {count} at {cells_text(where)}" for count, where in calls.items()]
    found += [f"{chosen} at {cells_text(where)}" for chosen, where in tuned.items()]
    unmeasured = (f"{row.index}: {row.note}" for row in results.rows if row.note)
    return [*found, *results.notes, *dict.fromkeys(unmeasured)]


def rates_text(rates: Rates) -> str:
    """The limits in words."""
    int8 = "unknown" if rates.int8 is None else f"{rates.int8 / 1e9:,.0f} GOP/s"
    return (
        f"reading {rates.read / 1e9:.1f} GB/s, fp32 product {rates.fp32 / 1e9:,.0f} GFLOP/s, int8 "
        f"product {int8}"
    )


def headlines(rows: Sequence[Measurement]) -> list[str]:
    """How many times as fast the exact index is as FAISS's, by the medians, a line for each k."""
    rate = {(row.label, row.cell): row.queries_per_second for row in rows}
    lines = []
    for k in sorted({row.k for row in rows}):
        parts = []
        for cell in dict.fromkeys(row.cell for row in rows if row.k == k):
            ours, flat = rate.get(("exact", cell)), rate.get(("Flat", cell))
            tuned = rate.get(("Flat tuned", cell))
            if ours and flat and tuned:
                parts.append(f"{times(ours / flat)} / {times(ours / tuned)} at Q={cell.queries}")
        if parts:
            lines.append(f"exact, in Flat's speed as it is / tuned, k={k}: {', '.join(parts)}")
    return lines


def times(ratio: float) -> str:
    """A ratio with two digits or three."""
    return f"{ratio:.1f}x" if ratio >= 1 else f"{ratio:.2f}x"


def print_sheet(sheet: Sheet) -> None:
    """On the terminal, with a blank line where the number of queries changes."""
    table = Table(box=None, pad_edge=False, title=sheet.title, title_justify="left")
    for number, heading in enumerate(sheet.headings):
        table.add_column(heading, justify="left" if number < sheet.words else "right")
    size = sheet.headings.index("Q") if "Q" in sheet.headings else None
    before: str | None = None
    for row in sheet.rows:
        if size is not None and before not in (None, row[size]):
            table.add_row()
        before = None if size is None else row[size]
        table.add_row(*(Text(cell) for cell in row))
    print_table(table)


def markdown(results: Results) -> str:
    """The tables, the notes and the environment as Markdown."""
    about = results.about
    lines = [f"# Search over {about['rows']:,} x {about['dim']}", ""]
    for sheet in sheets(results):
        lines += [f"{sheet.title}:", "", *markdown_table(sheet), ""]
    lines += [*(f"- {note}" for note in notes(results)), ""]
    lines += [f"- {key}: {value}" for key, value in about.items()]
    return "\n".join(lines) + "\n"


def markdown_table(sheet: Sheet) -> list[str]:
    """The lines of one table."""
    marks = [" --- |"] * sheet.words + [" ---: |"] * (len(sheet.headings) - sheet.words)
    return [
        f"| {' | '.join(sheet.headings)} |",
        "|" + "".join(marks),
        *("| " + " | ".join(row) + " |" for row in sheet.rows),
    ]
