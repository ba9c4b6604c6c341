"""Pictures of a benchmark: speeds, recall against speed, bytes against speed."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from twotower.retrieval.benchmark.contenders import Cell
from twotower.retrieval.benchmark.measurement import Measurement, Results, pareto_front, recall_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLUMNS = 4  # panels beside one another
SHOWN_SIZES = 3  # batch sizes of the scatter plots: the smallest, the largest, one between
COMMON_K = 10  # the number of results that is plotted, or the nearest to it
GOOD = 0.95  # recall that an index should reach in the plot of bytes
MARKS = "osD^vP"
GREY = "#8a94a0"
NEARLY = 1e-3  # how far recall 1 lies beyond 0.999 in the plots
RECALLS = (0.0, 0.5, 0.8, 0.9, 0.95, 0.98, 0.99, 0.998, 1.0)

Array = npt.NDArray[np.float64]

Recall = Callable[[Measurement], float | None]


def plot_bars(results: Results, file: Path) -> None:
    """Bars of queries/s by index and setting, a panel a batch size, each with its recall."""
    rows = plotted(results.rows)
    cells = list(dict.fromkeys(row.cell for row in rows)) or [Cell(1, COMMON_K)]
    labels = list(dict.fromkeys(row.label for row in rows))
    columns = min(len(cells), COLUMNS)
    lines = math.ceil(len(cells) / columns)
    height = lines * (0.9 + 0.25 * len(labels)) + 0.6
    figure = _figure(2.2 + 3.2 * columns, height)
    panels = list(figure.subplots(lines, columns, sharey=True, squeeze=False).flat)
    for panel, cell in zip(panels, cells, strict=False):
        _bars(panel, [row for row in rows if row.cell == cell])
        panel.set_title(_title(cell), fontsize=10)
    for panel in panels[len(cells) :]:
        panel.set_visible(False)
    panels[0].invert_yaxis()  # of all, which share it
    _heading(figure, results, cells[0].k)
    figure.savefig(file, format="png", dpi=130)


def _bars(panel: Axes, rows: Sequence[Measurement]) -> None:
    labels = [row.label for row in rows]
    rates = [row.queries_per_second or 0.0 for row in rows]
    colours = ["#2f6db5" if row.index.startswith("exact") else "#b9c4d0" for row in rows]
    panel.barh(labels, rates, color=colours)
    panel.tick_params(labelsize=8)
    if rates:  # a logarithmic axis of nothing is an error
        panel.set_xscale("log")
        panel.set_xlim(min(rates) / 3, max(rates) * 12)
    for place, row in enumerate(rows):
        recall = recall_of(row)
        if recall is not None:
            panel.text(rates[place] * 1.1, place, f"{recall:.4f}", va="center", fontsize=7)
    panel.set_xlabel("queries/s (recall beside the bar)", fontsize=8)
    panel.spines[["top", "right"]].set_visible(False)


def plot_recall(results: Results, file: Path) -> None:
    """Recall against queries/s: a curve an index, the Pareto front; texts above, pictures below."""
    rows = plotted(results.rows)
    cells = _some_cells(rows)
    kinds: dict[str, Recall] = {
        "text queries": lambda row: row.text_recall,
        "image queries": lambda row: row.image_recall,
    }
    kinds = {what: of for what, of in kinds.items() if any(of(row) is not None for row in rows)}
    names = list(dict.fromkeys(row.index for row in rows))
    figure = _figure(2.6 + 3.6 * len(cells), 0.8 + 3.2 * max(len(kinds), 1))
    panels = figure.subplots(max(len(kinds), 1), len(cells), squeeze=False, sharex="row")
    for line, (what, recall) in zip(panels, kinds.items(), strict=False):
        for panel, cell in zip(line, cells, strict=True):
            _curves(panel, [row for row in rows if row.cell == cell], names, recall)
            panel.set_title(f"{what}, {_title(cell)}", fontsize=9)
            panel.set_xlabel(f"recall@{cell.k}", fontsize=8)
        line[0].set_ylabel("queries/s", fontsize=8)
    _legend(figure, panels[0][0])
    _heading(figure, results, cells[0].k)
    figure.savefig(file, format="png", dpi=130)


def _curves(panel: Axes, rows: Sequence[Measurement], names: Sequence[str], recall: Recall) -> None:
    """The settings of each index as a curve, and the front of them all."""
    points = [(recall(row) or 0.0, row.queries_per_second or 0.0) for row in rows]
    front = sorted(points[place] for place in pareto_front(points))
    panel.plot(*zip(*front, strict=True), "--", color="#c8ced6", lw=4, label="Pareto front")
    for name in names:
        for tuned in (False, True):
            mine = [
                (*point, row)
                for point, row in zip(points, rows, strict=True)
                if row.index == name and (row.setting == "tuned") == tuned
            ]
            if mine:
                xs, ys, found = zip(*mine, strict=True)
                colour, mark, size = _look(name, names, tuned)
                shown = found[0].label if tuned else name
                panel.plot(xs, ys, mark + "-", color=colour, ms=size, lw=1.2, label=shown)
    panel.set_xscale("function", functions=(_nines, _from_nines))
    least = min(0.9, *(x for x, _ in points))
    ticks = [tick for tick in RECALLS if tick >= least - 0.02]
    panel.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    panel.set_xlim(max(0.0, least - 0.15 * (1 - least)), 1 + NEARLY / 3)
    _plain(panel)


def plot_bytes(results: Results, file: Path) -> None:
    """Bytes a vector against queries/s, each index at one setting of good recall.

    That is the fastest at the smallest batch; the other panels show the same.
    """
    rows = plotted(results.rows)
    cells = _some_cells(rows)
    chosen = {row.label for row in chosen_settings([row for row in rows if row.cell == cells[0]])}
    names = list(dict.fromkeys(row.index for row in rows))
    most = max((row.bytes_per_vector or 0.0 for row in rows), default=1.0)
    figure = _figure(3.6 + 3.6 * len(cells), 3.9)
    panels = figure.subplots(1, len(cells), squeeze=False)[0]
    for panel, cell in zip(panels, cells, strict=True):
        for row in (row for row in rows if row.cell == cell and row.label in chosen):
            colour, mark, size = _look(row.index, names, row.setting == "tuned")
            shown = f"{row.label}  ({recall_of(row) or 0:.4f})"
            place = (row.bytes_per_vector, row.queries_per_second)
            panel.plot(*place, mark, color=colour, ms=size + 2, label=shown)
        panel.set_title(_title(cell), fontsize=9)
        panel.set_xlabel("bytes a vector", fontsize=8)
        panel.set_xlim(0, 1.08 * most)
        _plain(panel)
    panels[0].set_ylabel("queries/s", fontsize=8)
    _legend(figure, panels[0], "index at a setting (recall)")
    _heading(figure, results, cells[0].k)
    figure.savefig(file, format="png", dpi=130)


def chosen_settings(rows: Sequence[Measurement]) -> list[Measurement]:
    """Of each index the fastest row of a recall of 0.95 or more, or that of the best; and tuned."""
    groups: dict[tuple[str, bool], list[Measurement]] = {}
    for row in rows:
        groups.setdefault((row.index, row.setting == "tuned"), []).append(row)
    return [max(group, key=_worth) for group in groups.values()]


def _worth(row: Measurement) -> tuple[float, float]:
    recall = recall_of(row) or 0.0
    return (min(recall, GOOD), row.queries_per_second or 0.0)


def plotted(rows: Sequence[Measurement]) -> list[Measurement]:
    """The rows with figures, of the number of results that is nearest to 10."""
    measured = [row for row in rows if row.queries_per_second is not None]
    k = min((row.k for row in measured), key=lambda k: (abs(k - COMMON_K), k), default=COMMON_K)
    return [row for row in measured if row.k == k]


def _some_cells(rows: Sequence[Measurement]) -> list[Cell]:
    """The smallest batch, the largest, and one between."""
    cells = sorted({row.cell for row in rows}) or [Cell(1, COMMON_K)]
    if len(cells) <= SHOWN_SIZES:
        return cells
    return [cells[0], cells[len(cells) // 2], cells[-1]]


def _look(name: str, names: Sequence[str], tuned: bool) -> tuple[str, str, float]:
    """Colour, mark and size of an index."""
    if name == "exact":
        return "#2f6db5", "*", 11
    if name == "Flat":
        return (GREY, "X", 7) if tuned else (GREY, "o", 6)
    others = [other for other in names if other not in ("exact", "Flat")]
    place = others.index(name)
    colours = ("#d1662a", "#3c9d5d", "#9b59b6", "#c0392b", "#0f8b8d", "#b8860b", "#e377c2", "#444")
    return colours[place % len(colours)], MARKS[(place + 1) % len(MARKS)], 5


def _figure(width: float, height: float) -> Figure:
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def _legend(figure: Figure, panel: Axes, title: str = "") -> None:
    handles, labels = panel.get_legend_handles_labels()
    if handles:
        figure.legend(
            handles, labels, loc="outside right center", fontsize=8, frameon=False,
            title=title or None, title_fontsize=8,
        )  # fmt: skip


def _heading(figure: Figure, results: Results, k: int) -> None:
    about = results.about
    threads = about["torch_threads"]
    figure.suptitle(
        f"{about['rows']:,} x {about['dim']}, {threads} thread{'s' if threads > 1 else ''}, k={k}\n"
        f"timed with {about['timed_queries']}",
        fontsize=10,
    )


def _title(cell: Cell) -> str:
    return f"{cell.queries} quer{'y' if cell.queries == 1 else 'ies'} a call"


def _nines(recall: Array) -> Array:
    """The scale of recall: 0.9, 0.99 and 0.999 stand apart, and 1 is not far away."""
    return -np.log10(np.maximum(1 + NEARLY - recall, NEARLY / 2))


def _from_nines(value: Array) -> Array:
    return 1 + NEARLY - 10.0 ** (-value)


def _plain(panel: Axes) -> None:
    from matplotlib.ticker import EngFormatter, LogLocator

    panel.set_yscale("log")
    panel.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    panel.yaxis.set_major_formatter(EngFormatter(sep=""))
    panel.yaxis.set_minor_formatter("")
    panel.tick_params(which="both", labelsize=8)
    panel.grid(True, color="#e6e9ed", lw=0.6)
    panel.set_axisbelow(True)
    panel.spines[["top", "right"]].set_visible(False)
