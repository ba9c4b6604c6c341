"""What the searches are measured against: a double loop in fp64."""

from __future__ import annotations

import numpy as np

from twotower.config import Metric
from twotower.retrieval.index import AnyFloatArray, IdArray, SearchResult


def brute_force(
    rows: AnyFloatArray, ids: IdArray, queries: AnyFloatArray, k: int, metric: Metric
) -> SearchResult:
    """All scores in fp64, rounded to fp32, sorted by score and then by id; padded to k."""
    scores = np.full((len(queries), k), -np.inf, np.float32)
    found = np.full((len(queries), k), -1, np.int64)
    for number, query in enumerate(queries.astype(np.float64)):
        exact = (rows.astype(np.float64) * query).sum(axis=1)
        if metric is Metric.cosine:
            norm = np.sqrt((query * query).sum())
            exact = exact / (norm if norm > 0 else 1)
        rounded = (exact + 0.0).astype(np.float32)
        order = np.lexsort((ids, -rounded))[:k]
        scores[number, : len(order)] = rounded[order]
        found[number, : len(order)] = ids[order]
    return SearchResult(scores, found)


def assert_equal_up_to_ties(
    result: SearchResult, rows: AnyFloatArray, ids: IdArray, queries: AnyFloatArray
) -> None:
    """The result is a right answer: its scores are the best ones, and each id has its score.

    Two scores tie when they differ by at most 1e-6 * |query| * |row|.
    """
    wide, wide_queries = rows.astype(np.float64), queries.astype(np.float64)
    place = {int(row_id): number for number, row_id in enumerate(ids)}
    for query, scores, found in zip(wide_queries, *result, strict=True):
        real = found != -1
        assert real.sum() == min(len(found), len(rows))
        chosen = [place[int(row_id)] for row_id in found[real]]
        assert len(set(chosen)) == len(chosen)
        exact = wide @ query
        tie = 1e-6 * np.linalg.norm(query) * np.linalg.norm(wide, axis=1)
        best = np.argsort(-exact)[: len(chosen)]
        slack = np.maximum(tie[chosen], tie[best])
        assert (np.abs(exact[chosen] - exact[best]) <= slack).all()
        # Below its range fp32 has one step for all; above it there is infinity.
        with np.errstate(over="ignore"):
            beyond = np.isinf(scores[real]) & (scores[real] == exact[chosen].astype(np.float32))
        near = np.abs(scores[real] - exact[chosen]) <= tie[chosen] + 2.0**-149
        assert (near | beyond).all()
        assert (scores[real][1:] <= scores[real][:-1]).all()
