"""The figures of one index at one setting, batch size and number of results."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from twotower.benchmark_config import QueryKind
from twotower.retrieval.benchmark.building import Built
from twotower.retrieval.benchmark.contenders import Cell, Contender
from twotower.retrieval.benchmark.limits import Rates, least_work, share_of


@dataclass(frozen=True)
class Measurement:
    """One index, one setting of it, one batch size, one number of results.

    Attributes:
        index: `exact` or a FAISS factory string.
        setting: of its search, such as `nprobe=16` or `tuned`; empty is as it is.
        queries: queries a call; k: results a query; calls: timed calls, all rounds together.
        build_seconds: from rows in memory to an index that can be searched, training included.
        queries_per_second: at the median call; p50_ms, p95_ms: time of a call in milliseconds.
        round_ms: the median call of each round, milliseconds: their spread is the noise.
        text_recall, image_recall: share of the exact k best that is found (see recall.py).
        bytes_per_vector: of the whole index, ids included.
        read_share, arithmetic_share: of the machine's limits (see limits.py).
        chosen: what tuning chose; note: why there are no figures.
    """

    index: str
    setting: str
    queries: int
    k: int
    calls: int = 0
    build_seconds: float | None = None
    queries_per_second: float | None = None
    p50_ms: float | None = None
    p95_ms: float | None = None
    round_ms: list[float] = field(default_factory=list)
    text_recall: float | None = None
    image_recall: float | None = None
    bytes_per_vector: float | None = None
    read_share: float | None = None
    arithmetic_share: float | None = None
    chosen: str = ""
    note: str = ""

    @property
    def label(self) -> str:
        """The index with its setting."""
        return f"{self.index} {self.setting}".strip()

    @property
    def cell(self) -> Cell:
        """The batch size and the number of results."""
        return Cell(self.queries, self.k)

    @property
    def share(self) -> tuple[float, str] | None:
        """The larger share and what it is of: `read` or `arith`; None for approximate indexes."""
        shares = {"read": self.read_share, "arith": self.arithmetic_share}
        known = [(value, name) for name, value in shares.items() if value is not None]
        return max(known) if known else None


@dataclass(frozen=True)
class Results:
    """A whole benchmark: machine and data, its limits, figures, and what to know about them."""

    about: Mapping[str, Any]
    rates: Rates | None
    rows: Sequence[Measurement]
    notes: Sequence[str]


def not_measured(index: str, cell: Cell, why: str) -> Measurement:
    """A row without figures."""
    return Measurement(index, "", cell.queries, cell.k, note=why)


def measured(
    contender: Contender,
    cell: Cell,
    built: Built,
    recalls: Mapping[QueryKind, float | None],
    rounds: Sequence[Sequence[float]],
    rates: Rates | None,
) -> Measurement:
    """A row from the seconds of every call, round by round; without times if there was no round."""
    rows, dim = len(built.index), built.index.dim
    known: dict[str, Any] = {
        "build_seconds": built.seconds,
        "bytes_per_vector": built.nbytes / rows,
        "text_recall": recalls.get(QueryKind.text),
        "image_recall": recalls.get(QueryKind.image),
        "chosen": contender.chosen(cell),
    }
    where = (contender.name, contender.setting, cell.queries, cell.k)
    seconds = list(itertools.chain.from_iterable(rounds))
    if not seconds:
        return Measurement(*where, **known, note=f"stopped before {cell}")
    p50, p95 = np.percentile(seconds, [50, 95])
    work = least_work(built.index.config, contender.name, rows, dim, cell.queries, cell.k)
    if work and rates:
        share = share_of(work, float(p50), rates)
        known |= {"read_share": share.read, "arithmetic_share": share.arithmetic}
    return Measurement(
        *where,
        **known,
        calls=len(seconds),
        queries_per_second=cell.queries / float(p50),
        p50_ms=float(p50) * 1000,
        p95_ms=float(p95) * 1000,
        round_ms=[statistics.median(calls) * 1000 for calls in rounds],
    )


def on_front(rows: Sequence[Measurement]) -> set[tuple[str, Cell]]:
    """Rows that none of their cell beats in both recall and queries/s.

    Recall is that with texts, or with pictures where there are no texts.
    """
    found = set()
    for cell in {row.cell for row in rows}:
        here = [row for row in rows if row.cell == cell and row.queries_per_second is not None]
        points = [(recall_of(row) or 0.0, row.queries_per_second or 0.0) for row in here]
        found |= {(here[place].label, cell) for place in pareto_front(points)}
    return found


def recall_of(row: Measurement) -> float | None:
    """The recall with texts, or with pictures where there are no texts."""
    return row.image_recall if row.text_recall is None else row.text_recall


def pareto_front(points: Sequence[tuple[float, float]]) -> list[int]:
    """The places of points that no other one reaches in both numbers and beats in one, ascending.

    Larger is better; of equal points all are on the front.
    """
    return [
        place
        for place, (x, y) in enumerate(points)
        if not any(a >= x and b >= y and (a > x or b > y) for a, b in points)
    ]
