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
from twotower.retrieval.auto.recall import search_others, shares_found
from twotower.retrieval.build import gather, sample_positions, shards_of
from twotower.retrieval.exact import ExactIndex
from twotower.retrieval.index import FloatArray, IdArray, Modality, SearchResult, VectorIndex

LEAST_CALLS, MOST_CALLS = 20, 300
MOST_SECONDS = 3.0  # of timing one index, beyond the least calls
NORMAL_95 = 1.959964  # half-width of a 95 % interval, in standard deviations


class Interval(NamedTuple):
    """A share and its 95 % interval."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class HeldOut:
    """Queries of one kind and what the exact index answers.

    Attributes:
        vectors: (Q, D).
        own: the ids (Q,) of the rows that the queries are themselves, which count neither as found
            nor as to be found; None where a query is no row of the index.
        best: the k best other rows.
    """

    vectors: FloatArray
    own: IdArray | None
    best: SearchResult

    def __len__(self) -> int:
        return len(self.vectors)

    def part(self, chosen: slice) -> HeldOut:
        """Some of them."""
        own = None if self.own is None else self.own[chosen]
        best = SearchResult(self.best.scores[chosen], self.best.ids[chosen])
        return HeldOut(self.vectors[chosen], own, best)

    def recalls(self, index: VectorIndex, reference: ExactIndex) -> npt.NDArray[np.float64]:
        """By query (Q,) the share of the exact k best rows that is found; see `shares_found`."""
        found = search_others(index, self.vectors, self.own, self.best.ids.shape[1])
        return shares_found(reference, self.vectors, found.ids, self.best)


def draw_queries(
    store: EmbeddingStore,
    reference: ExactIndex,
    kind: Modality,
    searched: Modality,
    *,
    k: int,
    count: int,
    seed: int,
) -> HeldOut:
    """At most `count` pictures or captions of a store as queries, drawn by seed, in random order.

    Where they are of the kind that is searched, each leaves out its own row.
    """
    chosen = sample_positions(len(store), count, seed)
    np.random.default_rng(seed).shuffle(chosen)
    order = np.argsort(chosen)
    vectors = np.empty((len(chosen), store.manifest.dim), np.float32)
    vectors[order] = gather(shards_of(store, kind), chosen[order])
    own = store.row_ids()[chosen] if kind is searched else None
    return HeldOut(vectors, own, search_others(reference, vectors, own, k))


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
