"""A benchmark's figures as the user gets them: a table, JSON lines, Markdown and a plot."""

from __future__ import annotations

import dataclasses
import json
import os
import platform
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from rich.table import Table
from rich.text import Text

from twotower.checkpoint.atomic import replacing
from twotower.console import print_table, say
from twotower.retrieval.faiss_index import import_faiss
from twotower.settings import ConfigError

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from twotower.retrieval.benchmark import Measurement

HEADINGS = ("index", "Q", "build s", "queries/s", "p50 ms", "p95 ms", "recall@{k}", "bytes/vector")


def environment() -> dict[str, Any]:
    """The machine, the threads and the arithmetic libraries that figures depend on.

    FAISS gets as many threads as torch: comparing different numbers would say nothing.
    """
    blas = np.show_config(mode="dicts")["Build Dependencies"]["blas"]
    torch_blas = re.search(r"BLAS_INFO=(\w+)", torch.__config__.show())
    about = {
        "processor": processor(),
        "cores": len(os.sched_getaffinity(0)),
        "torch": torch.__version__,
        "torch_threads": torch.get_num_threads(),
        "torch_blas": torch_blas[1] if torch_blas else "unknown",
        "torch_cpu": torch.backends.cpu.get_cpu_capability(),
        "numpy": np.__version__,
        "numpy_blas": f"{blas.get('name')} {blas.get('version')}",
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "unset"),
    }
    try:
        faiss = import_faiss()
    except ConfigError:
        return {**about, "faiss": "not installed"}
    faiss.omp_set_num_threads(torch.get_num_threads())
    return {
        **about,
        "faiss": faiss.__version__,
        "faiss_threads": faiss.omp_get_max_threads(),
        "faiss_compile_options": faiss.get_compile_options().strip(),
        "faiss_blas_threshold": faiss.cvar.distance_compute_blas_threshold,
    }


def processor() -> str:
    """The processor's name, as far as the system tells it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def report(rows: Sequence[Measurement], about: Mapping[str, Any], folder: Path) -> None:
    """Print the table and the environment; write benchmark.jsonl, benchmark.md and benchmark.png.

    Raises:
        ConfigError: the folder cannot be written.
    """
    headings = [heading.format(k=about["k"]) for heading in HEADINGS]
    for key, value in about.items():
        say(f"{key}: {value}")
    _print(headings, rows)
    lines = [{"kind": "environment", **about}]
    lines += [{"kind": "measurement", **dataclasses.asdict(row)} for row in rows]
    with replacing(folder / "benchmark.jsonl") as temporary:
        temporary.write_text("".join(json.dumps(line) + "\n" for line in lines))
    with replacing(folder / "benchmark.md") as temporary:
        temporary.write_text(markdown(headings, rows, about))
    with replacing(folder / "benchmark.png") as temporary:
        plot(rows, about, temporary)
    for name in ("benchmark.jsonl", "benchmark.md", "benchmark.png"):
        say(str(folder / name))


def cells(row: Measurement) -> list[str]:
    """One measurement as the columns of `HEADINGS`; a dash where there is no figure."""

    def shown(value: float | None, form: str) -> str:
        return "-" if value is None else format(value, form)

    return [
        row.index,
        str(row.queries),
        shown(row.build_seconds, ".2f"),
        shown(row.queries_per_second, ",.0f"),
        shown(row.p50_ms, ".3f"),
        shown(row.p95_ms, ".3f"),
        shown(row.recall, ".4f"),
        shown(row.bytes_per_vector, ",.0f"),
    ]


def _notes(rows: Sequence[Measurement]) -> list[str]:
    """How many calls the figures are from, and what could not be measured."""
    calls = {row.queries: row.calls for row in rows if row.calls}
    timed = ", ".join(f"{count} at Q={queries}" for queries, count in calls.items())
    notes = [f"timed calls of each index: {timed}"] if timed else []
    return notes + list(dict.fromkeys(f"{row.index}: {row.note}" for row in rows if row.note))


def _print(headings: Sequence[str], rows: Sequence[Measurement]) -> None:
    table = Table(box=None, pad_edge=False)
    for number, heading in enumerate(headings):
        table.add_column(heading, justify="left" if number == 0 else "right")
    for row in rows:
        table.add_row(*(Text(cell) for cell in cells(row)))
    print_table(table)
    for note in _notes(rows):
        say(note)


def markdown(headings: Sequence[str], rows: Sequence[Measurement], about: Mapping[str, Any]) -> str:
    """The table, the timed calls, what could not be measured, and the environment, as Markdown."""
    lines = [
        f"# Search over {about['rows']:,} x {about['dim']}, queries: {about['queries_are']}",
        "",
        "| " + " | ".join(headings) + " |",
        "| --- |" + " ---: |" * (len(headings) - 1),
    ]
    lines += ["| " + " | ".join(cells(row)) + " |" for row in rows]
    lines += ["", *(f"- {note}" for note in _notes(rows)), ""]
    lines += [f"- {key}: {value}" for key, value in about.items()]
    return "\n".join(lines) + "\n"


def plot(rows: Sequence[Measurement], about: Mapping[str, Any], file: Path) -> None:
    """Bars of queries/s by index, a panel a batch size, each with its recall."""
    from matplotlib.figure import Figure

    measured = [row for row in rows if row.queries_per_second is not None]
    sizes = list(dict.fromkeys(row.queries for row in rows))
    names = list(dict.fromkeys(row.index for row in measured))
    figure = Figure(figsize=(2.2 + 3.2 * len(sizes), 1.6 + 0.42 * len(names)), layout="constrained")
    panels = figure.subplots(1, len(sizes), sharey=True, squeeze=False)[0]
    for panel, size in zip(panels, sizes, strict=True):
        _bars(panel, [row for row in measured if row.queries == size], about["k"])
        panel.set_title(f"{size} quer{'y' if size == 1 else 'ies'} a call", fontsize=10)
    figure.suptitle(
        f"{about['rows']:,} x {about['dim']}, {about['torch_threads']} thread(s), queries: "
        f"{about['queries_are']}",
        fontsize=10,
    )
    figure.savefig(file, format="png", dpi=130)


def _bars(panel: Axes, rows: Sequence[Measurement], k: int) -> None:
    names = [row.index for row in rows]
    rates = [row.queries_per_second or 0.0 for row in rows]
    colours = ["#2f6db5" if name == "exact" else "#b9c4d0" for name in names]
    panel.barh(names, rates, color=colours)
    panel.invert_yaxis()
    if rates:  # a logarithmic axis of nothing is an error
        panel.set_xscale("log")
        panel.set_xlim(min(rates) / 3, max(rates) * 12)
    for place, row in enumerate(rows):
        panel.text(rates[place] * 1.1, place, f"{row.recall:.3f}", va="center", fontsize=8)
    panel.set_xlabel(f"queries/s (recall@{k} beside the bar)", fontsize=8)
    panel.spines[["top", "right"]].set_visible(False)
