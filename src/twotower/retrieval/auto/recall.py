"""How much of the exact answer an index finds."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from twotower.retrieval.exact import ExactIndex
from twotower.retrieval.index import NO_ID, FloatArray, IdArray, SearchResult, VectorIndex


def search_others(
    index: VectorIndex, queries: FloatArray, own: IdArray | None, k: int
) -> SearchResult:
    """The k best rows of queries (Q, D), without the rows (Q,) that they are themselves, if any.

    A query is no answer to itself: k + 1 rows are asked for, and it is left out, or the last one
    where it was not found.
    """
    if own is None:
        return index.search(queries, k)
    return without_own(index.search(queries, k + 1), own)


def without_own(found: SearchResult, own: IdArray) -> SearchResult:
    """Results (Q, k) from (Q, k + 1): without the query's own row, or without the last one."""
    is_own = found.ids == own[:, None]
    is_own[:, -1] |= ~is_own.any(axis=1)
    shape = (len(own), found.ids.shape[1] - 1)
    return SearchResult(found.scores[~is_own].reshape(shape), found.ids[~is_own].reshape(shape))


def shares_found(
    reference: ExactIndex, queries: FloatArray, found: IdArray, best: SearchResult
) -> npt.NDArray[np.float64]:
    """By query (Q,) the share of the exact best rows that is found, by ids (Q, k).

    A row counts if its exact score reaches the k-th best one, or ties with it: ids alone would
    count a row as missed that is as good as the one found in its place. Where there are fewer rows
    than k, what is left over is nothing to find.
    """
    scores, ties = reference.score(queries, found)
    wanted = (best.ids != NO_ID).sum(axis=1)
    threshold = np.take_along_axis(best.scores, np.maximum(wanted - 1, 0)[:, None], axis=1)
    hits = (scores >= threshold - ties) & (found != NO_ID)
    shares: npt.NDArray[np.float64] = hits.sum(axis=1) / np.maximum(wanted, 1)
    return shares
