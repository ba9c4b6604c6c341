"""The certified scan where there is no compiled one: int8 products of torch. Tier 2.

Products of a block of rows go to a buffer that stays in the cache. Of 64 rows one maximum is
compared with the threshold, with the largest error among them; only groups that pass are opened.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from functools import cache
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from twotower.retrieval.candidates import GROUP, Best, Candidates, group_size, rerank
from twotower.retrieval.certificate import Float64Array, Frame
from twotower.retrieval.certified_scan import CodedScan
from twotower.retrieval.native import CodedQueries
from twotower.retrieval.rows import Rows

QUERY_BLOCK = 256
PRODUCTS = 1 << 19  # in a block: 2 MB, and as much for the scores
BLOCK_ROWS = 1 << 16  # rows of a block at most
PENDING = 1 << 21  # candidates that may wait for the re-rank
FEW = 16  # from two queries to here the product is faster with the queries on the left


class Probe(NamedTuple):
    """What torch's int8 product is worth here."""

    right: bool
    faster: bool  # than that of fp32


@cache
def probe() -> Probe:
    """Try the int8 product, whose name is a private one of torch, beside that of fp32."""
    rng = np.random.default_rng(0)
    rows = torch.from_numpy(rng.integers(-127, 128, (2048, 256), np.int8))
    queries = torch.from_numpy(rng.integers(-127, 128, (256, 64), np.int8))
    out = torch.empty((len(rows), queries.shape[1]), dtype=torch.int32)
    wide_rows, wide_queries = rows.float(), queries.float()
    scores = torch.empty(out.shape)
    try:
        int8 = _seconds(lambda: torch._int_mm(rows, queries, out=out))
        fp32 = _seconds(lambda: torch.mm(wide_rows, wide_queries, out=scores))
    except (RuntimeError, AttributeError, TypeError, NotImplementedError):
        return Probe(False, False)
    right = torch.equal(out.double(), rows.double() @ queries.double())
    return Probe(right, right and int8 < fp32)


def _seconds(call: Callable[[], object]) -> float:
    """The least of a few times."""
    times = []
    for _ in range(4):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return min(times)


def rotate(unit: Float64Array, frame: Frame) -> Float64Array:
    """What `Frame.rotate` does, by torch: the threads of numpy's BLAS would go on spinning."""
    mixed = torch.from_numpy(unit[:, frame.order])
    blocks = [torch.from_numpy(block).double() for block in frame.columns]
    parts = mixed.tensor_split(np.cumsum([len(block) for block in blocks])[:-1].tolist(), dim=1)
    turned = [part @ block for part, block in zip(parts, blocks, strict=True)]
    return torch.cat(turned, dim=1).numpy()


class TorchScan(CodedScan):
    """The scan by `torch._int_mm`."""

    def __init__(self, rows: Rows) -> None:
        super().__init__(rows, packed=False)

    def query_block(self, k: int) -> int:
        """Queries that are best searched at a time."""
        return max(1, min(QUERY_BLOCK, PENDING // k))

    def search(self, queries: Float64Array, k: int) -> Best:
        """The best k rows of queries (Q, dim), none of them zero, in fp64; k <= rows."""
        with torch.inference_mode():
            return rerank(self._rows, self._scan(queries, k), queries, k)

    def _scan(self, queries: Float64Array, k: int) -> Candidates:
        """Every row that may be among the best k of a query; bounds are those of the unit query."""
        coded = self.coded.queries(queries, rotate)
        asked = _Asked(coded, k)
        pending: list[Candidates] = []
        limit = PENDING + 4 * k * len(queries)
        for block in self._blocks(len(queries)):
            pending.append(asked.possible(*block))
            if sum(len(part.query) for part in pending) > limit:
                kept = rerank(self._rows, Candidates.join(pending), queries, k)
                pending = [kept.found.widened(0.0)]
        return Candidates.join(pending)

    def _blocks(self, num_queries: int) -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor, int]]:
        """Codes, scales, errors and norms of some rows, and the position of the first."""
        step = min(max(PRODUCTS // num_queries, 1024), BLOCK_ROWS)
        for shard in self.coded.store.shards:
            columns = (shard.codes[0], shard.scale, shard.error, shard.norm)
            tensors = [torch.from_numpy(column) for column in columns]
            used = -(-shard.used // GROUP) * GROUP
            for start in range(0, used, step):
                codes, scale, error, norm = (t[start : min(start + step, used)] for t in tensors)
                yield codes, scale, error, norm, shard.first + start


class _Asked:
    """Some queries, and the k best lower bounds of each so far."""

    def __init__(self, coded: CodedQueries, k: int) -> None:
        count = len(coded.queries)
        codes = torch.from_numpy(coded.coded.codes)
        self._few = 1 < count < FEW
        self._codes = codes if self._few else codes.T.contiguous()
        self._count = count
        self._scale = torch.from_numpy(coded.coded.scale)
        self._error = torch.from_numpy(coded.coded.error)
        self._centre = coded.centre
        self._k = k
        self._best = torch.full((count, k), -torch.inf)
        self._threshold = torch.full((count,), -torch.inf)
        self._products = torch.empty(0, dtype=torch.int32)
        self._scores = torch.empty(0)

    def possible(
        self, codes: Tensor, scale: Tensor, error: Tensor, norm: Tensor, first: int
    ) -> Candidates:
        """The rows of a block that may be among the best."""
        rows = len(codes)
        scores = self._scores_of(codes, scale)
        dead = error == -torch.inf
        if dead.any():
            scores[dead] = -torch.inf
            error = error.clamp_min(0)
        per_group = group_size(rows, self._k)
        if self._few:
            groups = scores.T.view(self._count, per_group, -1).permute(1, 2, 0)
        else:
            groups = scores.view(per_group, -1, self._count)
        # (groups, Q): the best score of a group, with the largest error among its rows.
        middle = groups.amax(0) * self._scale
        width = norm.view(per_group, -1).amax(0)[:, None] * self._error
        width += error.view(per_group, -1).amax(0)[:, None]
        self._raise_threshold(middle - width)
        group, query = (middle + width >= self._threshold).nonzero(as_tuple=True)
        opened = groups[:, group, query] * self._scale[query]  # (per_group, hits)
        row = torch.arange(per_group)[:, None] * groups.shape[1] + group
        width = norm[row] * self._error[query] + error[row]
        upper = opened + width
        # Deleted rows have a bound of -inf, which reaches a threshold of -inf.
        place = (upper >= self._threshold[query]) & (upper > -torch.inf)
        found = query.expand_as(row)[place].numpy()
        return Candidates(
            found,
            row[place].numpy() + first,
            (opened - width)[place].double().numpy() + self._centre[found],
            upper[place].double().numpy() + self._centre[found],
        )

    def _scores_of(self, codes: Tensor, scale: Tensor) -> Tensor:
        """Products (rows, Q) times the scales of the rows; the next call overwrites them."""
        size = len(codes) * self._count
        if size > len(self._products):
            self._products = torch.empty(size, dtype=torch.int32)
            self._scores = torch.empty(size)
        shape = (self._count, len(codes)) if self._few else (len(codes), self._count)
        products, scores = self._products[:size].view(shape), self._scores[:size].view(shape)
        if self._few:
            torch._int_mm(self._codes, codes.T, out=products)
            return torch.mul(products, scale, out=scores).T
        torch._int_mm(codes, self._codes, out=products)
        return torch.mul(products, scale[:, None], out=scores)

    def _raise_threshold(self, lower: Tensor) -> None:
        """Take account of lower bounds (groups, Q) of as many rows."""
        raised = (lower > self._threshold).any(0).nonzero()[:, 0]
        if len(raised):  # of many queries few, once many rows are scanned
            both = torch.cat([self._best[raised], lower.T[raised]], 1)
            best = both.topk(self._k, sorted=False).values
            self._best[raised] = best
            self._threshold[raised] = best.amin(1)
