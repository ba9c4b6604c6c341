"""How much of the exact answer an index finds, with text queries and with pictures apart."""

from __future__ import annotations

from twotower.retrieval.auto.recall import search_others, shares_found
from twotower.retrieval.benchmark.data import Queries
from twotower.retrieval.exact import ExactIndex
from twotower.retrieval.index import SearchResult, VectorIndex


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
        """The share of the k exact best rows that the index finds; a query is no answer to itself.

        See `search_others` and `shares_found`.
        """
        vectors, _, own = self.queries
        if k not in self._best:
            self._best[k] = search_others(self._reference, vectors, own, k)
        found = search_others(index, vectors, own, k)
        return float(shares_found(self._reference, vectors, found.ids, self._best[k]).mean())
