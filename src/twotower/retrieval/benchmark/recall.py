"""How much of the exact answer an index finds, with text queries and with pictures apart."""

from __future__ import annotations

import numpy as np

from twotower.retrieval.benchmark.data import Queries
from twotower.retrieval.exact import ExactIndex
from twotower.retrieval.index import NO_ID, FloatArray, IdArray, SearchResult, VectorIndex


class Truth:
    """The exact answers to queries of one kind, for the numbers of results that are asked for."""

    def __init__(self, reference: ExactIndex, queries: Queries, count: int) -> None:
        own = queries.own
        self.queries = Queries(
            queries.vectors[:count], queries.what, None if own is None else own[:count]
        )
        self._reference = reference
        self._best: dict[int, SearchResult] = {}

    def recall(self, index: VectorIndex, k: int) -> float:
        """The share of the k exact best rows that the index finds; see `recall_at_k`.

        A query that is a row itself is no answer to itself: k + 1 rows are asked for, and it is
        left out, or the last one where it was not found.
        """
        if k not in self._best:
            self._best[k] = self._others(self._reference, k)
        found = self._others(index, k)
        return recall_at_k(self._reference, self.queries.vectors, found.ids, self._best[k])

    def _others(self, index: VectorIndex, k: int) -> SearchResult:
        vectors, _, own = self.queries
        if own is None:
            return index.search(vectors, k)
        return without_own(index.search(vectors, k + 1), own)


def without_own(found: SearchResult, own: IdArray) -> SearchResult:
    """Results (Q, k) from (Q, k + 1): without the query's own row, or without the last one."""
    is_own = found.ids == own[:, None]
    is_own[:, -1] |= ~is_own.any(axis=1)
    shape = (len(own), found.ids.shape[1] - 1)
    return SearchResult(found.scores[~is_own].reshape(shape), found.ids[~is_own].reshape(shape))


def recall_at_k(
    reference: ExactIndex, queries: FloatArray, found: IdArray, best: SearchResult
) -> float:
    """The share of found rows (Q, k) whose exact score reaches the k-th best one, or ties with it.

    Ids alone would count a row as missed that is as good as the one found in its place. Where there
    are fewer rows than k, what is left over is nothing to find.
    """
    scores, ties = reference.score(queries, found)
    wanted = (best.ids != NO_ID).sum(axis=1)
    threshold = np.take_along_axis(best.scores, np.maximum(wanted - 1, 0)[:, None], axis=1)
    hits = (scores >= threshold - ties) & (found != NO_ID)
    return float(hits.sum() / max(wanted.sum(), 1))
