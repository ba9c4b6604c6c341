"""The scan without codes: blocks of fp32 scores against a running threshold. Tier 3.

An fp32 score is off by at most `slack`: the error bound of a dot product, whatever its order of
summation (Higham, Accuracy and Stability of Numerical Algorithms, 3.1). So a row can only be among
the best k if its score plus slack reaches the k-th best score minus slack. The scan keeps every
such row and the re-rank decides in fp64: the answer does not depend on blocks, threads or batch.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor

from twotower.retrieval.index import Float64Array, divisors
from twotower.retrieval.rows import Rows
from twotower.retrieval.scan.candidates import (
    GROUP,
    Best,
    Candidates,
    above_threshold,
    products,
    rerank,
)

QUERY_BLOCK = 256  # queries scored at a time: with 8,192 rows 8 MB of scores
PENDING = 1 << 21  # candidates that may wait for the re-rank


@contextmanager
def full_precision() -> Iterator[None]:
    """fp32 products in fp32: TF32 or bf16, which training may allow, break the error bound."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


class ReferenceScan:
    """Scores every row in fp32; holds nothing beside the rows."""

    nbytes = 0

    def __init__(self, rows: Rows, block_rows: int) -> None:
        self._rows = rows
        self._block_rows = block_rows
        # d products and sums; eight roundings more for the query, the bounds, the result.
        self._relative_slack = (rows.dim + 8) * 2.0**-24 * 1.01
        # Products that underflow, or are flushed to zero.
        self._absolute_slack = (rows.dim + 1) * 2.0**-126

    def query_block(self, k: int) -> int:
        """Queries that are best searched at a time."""
        return max(1, min(QUERY_BLOCK, PENDING // k))

    def search(self, queries: Float64Array, k: int) -> Best:
        """The best k rows of queries (Q, dim), none of them zero, in fp64; k <= rows."""
        with torch.inference_mode(), full_precision():
            return rerank(self._rows, self._scan(queries, k), queries, k)

    def _scan(self, queries: Float64Array, k: int) -> Candidates:
        """Every row that may be among the best k of a query; bounds are those of the unit query."""
        unit = torch.from_numpy((queries / divisors(queries)[:, None]).astype(np.float32))
        best = torch.full((len(unit), k), -torch.inf)  # k lower bounds of distinct rows
        # One buffer: fresh pages for each block would cost more than the comparison.
        buffer = torch.empty(len(unit) * min(self._block_rows, self._rows.size))
        pending: list[Candidates] = []
        limit = PENDING + 4 * k * len(unit)
        for rows, start, largest in self._blocks():
            scores = products(unit, rows, buffer)
            scores[:, self._rows.ids.deleted(start, start + len(rows))] = -torch.inf
            slack = largest * self._relative_slack + self._absolute_slack
            found, best = above_threshold(scores, best, slack, k)
            found = found.select(found.upper > -np.inf)
            pending.append(found._replace(position=found.position + start))
            if sum(len(part.query) for part in pending) > limit:
                kept = rerank(self._rows, Candidates.join(pending), queries, k)
                pending = [kept.found.widened(self._absolute_slack)]
        return Candidates.join(pending)

    def _blocks(self) -> Iterator[tuple[Tensor, int, float]]:
        """Blocks of fp32 rows with the position of the first and the largest norm.

        A length is a multiple of GROUP or below it, so that groups come out even.
        """
        step = self._block_rows
        for part in self._rows.parts:
            tensor = part.tensor
            for start in range(0, len(tensor), step):
                stop = min(start + step, len(tensor))
                even = start + (stop - start) // GROUP * GROUP
                for low, high in ((start, even), (even, stop)):
                    if low < high:
                        largest = float(part.norms[low:high].max())
                        yield tensor[low:high].float(), part.start + low, largest
