"""Candidates of an exact search: which rows may be among the best, by bounds of their scores."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from twotower.config import Metric
from twotower.retrieval.index import Float64Array, IdArray, divisors
from twotower.retrieval.rows import Rows

FEW_QUERIES = 8  # up to here BLAS is up to three times as fast with the rows on the left
GROUP = 64  # scores behind one maximum: the threshold is compared with maxima, not with scores


class Candidates(NamedTuple):
    """Rows that may be among the best: a query, a position, and bounds of the score of the two."""

    query: IdArray
    position: IdArray
    lower: Float64Array
    upper: Float64Array

    def select(self, which: npt.NDArray[np.bool_] | IdArray) -> Candidates:
        """Those of a mask, or in an order."""
        return Candidates(
            self.query[which], self.position[which], self.lower[which], self.upper[which]
        )

    def widened(self, absolute: float) -> Candidates:
        """Bounds two fp32 steps apart, as scores that are equal once rounded go by id."""
        return self._replace(
            lower=self.lower - np.abs(self.lower) * 2.0**-22 - absolute,
            upper=self.upper + np.abs(self.upper) * 2.0**-22 + absolute,
        )

    @classmethod
    def join(cls, parts: list[Candidates]) -> Candidates:
        """All of several blocks."""
        return cls(*(np.concatenate(columns) for columns in zip(*parts, strict=True)))


class Best(NamedTuple):
    """The best candidates of each query, best first, with exact bounds, and their scores (n,)."""

    found: Candidates
    scores: Float64Array


def rank_in_query(query: IdArray) -> IdArray:
    """The place of each entry among those of its query; `query` is sorted."""
    return np.arange(len(query)) - np.searchsorted(query, query)


def products(queries: Tensor, rows: Tensor, buffer: Tensor) -> Tensor:
    """Scores (Q, n) of queries (Q, D) and rows (n, D), in `buffer`."""
    numbers = buffer[: len(queries) * len(rows)]
    if len(queries) > FEW_QUERIES:
        return torch.mm(queries, rows.T, out=numbers.view(len(queries), len(rows)))
    return torch.mm(rows, queries.T, out=numbers.view(len(rows), len(queries))).T


def round_to_24_bits(values: Float64Array) -> Float64Array:
    """Rounded as fp32 rounds, half to even, but without its limits: no underflow, no infinity."""
    bits = values.view(np.int64)
    half = (1 << 28) - 1 + ((bits >> 29) & 1)
    rounded: Float64Array = ((bits + half) & ~((1 << 29) - 1)).view(np.float64)
    return rounded


def group_size(n: int, k: int) -> int:
    """Of how many of n scores one maximum is to be taken, so that there are several times k."""
    per_group = 1
    while n % (2 * per_group) == 0 and per_group < GROUP and n // (2 * per_group) >= 4 * k:
        per_group *= 2
    return per_group


def above_threshold(
    scores: Tensor, best: Tensor, slack: float, k: int
) -> tuple[Candidates, Tensor]:
    """Candidates of a block of scores (Q, n), and the k best lower bounds (Q, k) so far.

    A group is every g-th column, not neighbours: rows that lie together are often alike (frames,
    classes), and maxima give a tight threshold only if the best rows are in different groups.
    """
    num_queries, n = scores.shape
    per_group = group_size(n, k)
    groups = scores.view(num_queries, per_group, n // per_group)
    peaks = groups.amax(1)  # (Q, g)
    best = torch.cat([best, peaks - slack], 1).topk(k, sorted=False).values
    threshold = best.amin(1)
    query, group = (peaks + slack >= threshold[:, None]).nonzero(as_tuple=True)
    opened = groups[query, :, group]  # (hits, per_group)
    hit, place = (opened + slack >= threshold[query, None]).nonzero(as_tuple=True)
    value = opened[hit, place].double().numpy()
    position = place * (n // per_group) + group[hit]
    found = Candidates(query[hit].numpy(), position.numpy(), value - slack, value + slack)
    return found, best


def keep_possible(found: Candidates, k: int) -> Candidates:
    """Drop what k others of its query surely beat; sorted by query."""
    found = found.select(np.lexsort((-found.lower, found.query)))
    kth = rank_in_query(found.query) == k - 1
    threshold = np.full(int(found.query[-1]) + 1, -np.inf)
    threshold[found.query[kth]] = found.lower[kth]
    return found.select(found.upper >= threshold[found.query])


def rerank(rows: Rows, found: Candidates, queries: Float64Array, k: int) -> Best:
    """The best k of each query's candidates, with exact bounds, and their scores.

    Ranked by the score rounded as fp32 rounds it, then by id: scores that the user sees as
    equal stand in order of id.
    """
    found = keep_possible(found, k)
    norms = np.ones(len(queries)) if rows.metric is Metric.cosine else divisors(queries)
    # The k with the best lower bounds are most often the answer; few others can beat their scores.
    likely = rank_in_query(found.query) < k
    head, tail = found.select(likely), found.select(~likely)
    scores = rows.scores(queries, head.query, head.position)
    if len(tail.query):
        worst = np.full(len(queries), np.inf)
        np.minimum.at(worst, head.query, scores / norms[head.query])
        tail = tail.select(tail.upper >= worst[tail.query])
        scores = np.concatenate([scores, rows.scores(queries, tail.query, tail.position)])
    found = Candidates.join([head, tail])
    unit = scores / norms[found.query]
    ids = rows.ids.array[found.position]
    order = np.lexsort((ids, -round_to_24_bits(scores), found.query))
    order = order[rank_in_query(found.query[order]) < k]
    return Best(found._replace(lower=unit, upper=unit).select(order), scores[order])
