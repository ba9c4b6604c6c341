"""Recall by held-out queries, with intervals, and the time of a query."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from twotower.embedding.store import EmbeddingStore
from twotower.retrieval.build import gather, sample_positions, shards_of
from twotower.retrieval.exact import ExactIndex
from twotower.retrieval.index import FloatArray, IdArray, Modality, VectorIndex

LEAST_CALLS, MOST_CALLS = 20, 300
MOST_SECONDS = 3.0  # of timing one index, beyond the least calls
NORMAL_95 = 1.959964  # half-width of a 95 % interval, in standard deviations


class Interval(NamedTuple):
    """A share and its 95 % interval."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Queries:
    """Queries of one kind and what the exact index says of them.

    Attributes:
        vectors: (Q, D).
        own: the ids (Q,) of the rows that the queries are themselves, which count neither as found
            nor as to be found; None where a query is no row of the index.
        kth: the score (Q,) of the k-th best other row.
    """

    vectors: FloatArray
    own: IdArray | None
    kth: FloatArray
    k: int

    def part(self, chosen: slice) -> Queries:
        """Some of them."""
        own = None if self.own is None else self.own[chosen]
        return Queries(self.vectors[chosen], own, self.kth[chosen], self.k)

    def recalls(self, index: VectorIndex, reference: ExactIndex) -> npt.NDArray[np.float64]:
        """By query (Q,) the share of the k rows found that are as good as the exact k best.

        As good is what reaches the k-th best score or ties with it: of two equal rows either will
        do.
        """
        ids = _others(index.search(self.vectors, self._asked).ids, self.own)[:, : self.k]
        scores, ties = reference.score(self.vectors, ids)
        shares: npt.NDArray[np.float64] = (scores >= self.kth[:, None] - ties).mean(axis=1)
        return shares

    @property
    def _asked(self) -> int:
        return self.k + (self.own is not None)


def draw_queries(
    store: EmbeddingStore,
    reference: ExactIndex,
    kind: Modality,
    searched: Modality,
    *,
    k: int,
    count: int,
    seed: int,
) -> Queries:
    """At most `count` pictures or captions of a store as queries, drawn by seed, in random order.

    Where they are of the kind that is searched, each leaves out its own row.
    """
    chosen = sample_positions(len(store), count, seed)
    np.random.default_rng(seed).shuffle(chosen)
    order = np.argsort(chosen)
    vectors = np.empty((len(chosen), store.manifest.dim), np.float32)
    vectors[order] = gather(shards_of(store, kind), chosen[order])
    own = store.row_ids()[chosen] if kind is searched else None
    found = reference.search(vectors, k + (own is not None))
    keep = np.argsort(_is_own(found.ids, own), axis=1, kind="stable")[:, :k]
    kth = np.take_along_axis(found.scores, keep, 1)[:, -1]
    return Queries(vectors, own, kth, k)


def _is_own(ids: IdArray, own: IdArray | None) -> npt.NDArray[np.bool_]:
    return np.zeros(ids.shape, bool) if own is None else ids == own[:, None]


def _others(ids: IdArray, own: IdArray | None) -> IdArray:
    """The ids (Q, k) with a query's own row at the end, where it was found at all."""
    order = np.argsort(_is_own(ids, own), axis=1, kind="stable")
    others: IdArray = np.take_along_axis(ids, order, 1)
    return others


def wilson(shares: npt.NDArray[np.float64]) -> Interval:
    """The mean of shares (Q,) and its 95 % interval (Wilson 1927), with the queries as trials.

    A share varies no more than a trial of the same mean, so the interval is not too narrow; and it
    is none of width 0 where all shares are 1, as a bootstrap's would be.
    """
    count, mean = len(shares), float(shares.mean())
    square = NORMAL_95**2
    centre = (mean + square / (2 * count)) / (1 + square / count)
    half = math.sqrt(mean * (1 - mean) / count + square / (4 * count**2))
    half *= NORMAL_95 / (1 + square / count)
    return Interval(mean, max(0.0, centre - half), min(1.0, centre + half))


def latency_ms(index: VectorIndex, vectors: FloatArray, k: int) -> tuple[float, float]:
    """Median and 95th percentile of the milliseconds of a search with one query."""
    index.search(vectors[:1], k)
    seconds: list[float] = []
    begun = time.perf_counter()
    while len(seconds) < MOST_CALLS:
        if len(seconds) >= LEAST_CALLS and time.perf_counter() - begun > MOST_SECONDS:
            break
        query = vectors[len(seconds) % len(vectors)][None]
        started = time.perf_counter()
        index.search(query, k)
        seconds.append(time.perf_counter() - started)
    p50, p95 = np.percentile(seconds, [50, 95]) * 1000
    return float(p50), float(p95)


def smallest(reaches: Callable[[int], bool], largest: int) -> int | None:
    """The smallest number up to `largest` that reaches, to within an eighth; None if none does.

    Numbers are doubled until one does, then the last step is bisected; what reaches is taken to do
    so for all larger ones.
    """
    low, high = 0, 1
    while not reaches(high):
        if high >= largest:
            return None
        low, high = high, min(2 * high, largest)
    while high - low > max(1, low // 8):
        middle = (low + high) // 2
        low, high = (low, middle) if reaches(middle) else (middle, high)
    return high
