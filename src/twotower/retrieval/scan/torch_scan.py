"""The certified scan where there is no compiled one: int8 products of torch. Tier 2.

Products of a block of rows go to a buffer that stays in the cache, and are not scaled: of 64 rows
the largest product is compared with the least that can reach the threshold, by the largest scale
and the largest error among them. Only groups that pass are opened, and only rows of these that pass
as well are looked at with bounds of their own.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from functools import cache
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from twotower.retrieval.index import Float64Array, IdArray
from twotower.retrieval.rows import Rows
from twotower.retrieval.scan.candidates import (
    GROUP,
    Best,
    Candidates,
    group_size,
    rank_in_query,
    rerank,
)
from twotower.retrieval.scan.certificate import Frame
from twotower.retrieval.scan.certified_scan import CodedScan
from twotower.retrieval.scan.codes import DEAD, Shard
from twotower.retrieval.scan.native import CodedQueries

QUERY_BLOCK = 1024  # that pass over a block of rows while it lies in the cache
PRODUCT_QUERIES = 512  # of them, in a product
PRODUCTS = 1 << 20  # of a block: 4 MB
BLOCK_ROWS = 1 << 16  # rows of a block at most
PENDING = 1 << 21  # candidates that may wait for the re-rank
FEW = 16  # from two queries to here the product may be faster with the queries on the left
NEVER = -(1 << 31)  # less than half of it is no product of up to CODED_DIM dimensions
MOST = torch.finfo(torch.float32).max
LOWER = 1 - 2.0**-20  # what is rounded to fp32 does not rule out a row
NOTHING = Candidates(*(np.empty(0, kind) for kind in (np.int64, np.int64, float, float)))


class Probe(NamedTuple):
    """What torch's int8 product is worth here."""

    right: bool
    faster: bool  # than that of fp32
    left: bool = False  # with few queries it is faster if they are on the left


@cache
def probe() -> Probe:
    """Try the int8 product, whose name is a private one of torch, beside that of fp32."""
    rng = np.random.default_rng(0)
    rows = torch.from_numpy(rng.integers(-127, 128, (2048, 512), np.int8))
    queries = torch.from_numpy(rng.integers(-127, 128, (512, 64), np.int8))
    out = torch.empty((len(rows), queries.shape[1]), dtype=torch.int32)
    wide_rows, wide_queries = rows.float(), queries.float()
    scores = torch.empty(out.shape)
    few = queries[:, :4].contiguous()
    few_left = few.T.contiguous()
    try:
        int8 = _seconds(lambda: torch._int_mm(rows, queries, out=out))
        fp32 = _seconds(lambda: torch.mm(wide_rows, wide_queries, out=scores))
        right_side = _seconds(lambda: torch._int_mm(rows, few))
        left_side = _seconds(lambda: torch._int_mm(few_left, rows.T))
    except (RuntimeError, AttributeError, TypeError, NotImplementedError):
        return Probe(False, False)
    right = torch.equal(out.double(), rows.double() @ queries.double())
    return Probe(right, right and int8 < fp32, left_side < right_side)


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

    def __init__(
        self,
        rows: Rows,
        left: bool | None = None,
        block_rows: int | None = None,
        product_queries: int = PRODUCT_QUERIES,
        pending: int = PENDING,
    ) -> None:
        super().__init__(rows, packed=False)
        self._left = probe().left if left is None else left
        self._block_rows = block_rows
        self._product_queries = product_queries
        self._pending = pending

    def query_block(self, k: int) -> int:
        """Queries that are best searched at a time."""
        return max(1, min(QUERY_BLOCK, self._pending // k))

    def search(self, queries: Float64Array, k: int) -> Best:
        """The best k rows of queries (Q, dim), none of them zero, in fp64; k <= rows."""
        with torch.inference_mode():
            return rerank(self._rows, self._scan(queries, k), queries, k)

    def _scan(self, queries: Float64Array, k: int) -> Candidates:
        """Every row that may be among the best k of a query; bounds are those of the unit query."""
        coded = self.coded.queries(queries, rotate)
        parts = -(-len(queries) // self._product_queries)
        asked = [
            _Asked(coded, part, k, self._left)
            for part in np.array_split(np.arange(len(queries)), parts)
        ]
        limit = self._pending + 4 * k * len(queries)
        pending: list[Candidates] = []
        for shard in self.coded.store.shards:
            for block in self._blocks(shard, asked):
                for some in asked:
                    some.scan(block)
                pending += [some.take(shard) for some in asked if some.full]
                if sum(len(part.query) for part in pending) > limit:
                    kept = rerank(self._rows, Candidates.join(pending), queries, k)
                    pending = [kept.found.widened(0.0)]
            pending += [some.take(shard) for some in asked]
        return Candidates.join(pending)

    def _blocks(self, shard: Shard, asked: list[_Asked]) -> Iterator[_Block]:
        fit = min(max(PRODUCTS // asked[0].count, 1024), BLOCK_ROWS)
        step = self._block_rows or fit // GROUP * GROUP
        used = -(-shard.used // GROUP) * GROUP
        for start in range(0, used, step):
            seeds = max(some.seeds for some in asked)
            yield _Block(shard, start, min(start + step, used), seeds)


class _Block:
    """Some rows of a shard, in groups of those that lie together.

    `seeds` is of how many groups lower bounds are wanted. What is said of groups is (groups, 1).
    """

    def __init__(self, shard: Shard, start: int, stop: int, seeds: int) -> None:
        self.start = start
        self.codes = torch.from_numpy(shard.codes[0][start:stop])
        self.per_group = group_size(stop - start, seeds)
        scale, error, norm = (
            torch.from_numpy(column[start:stop]).view(-1, self.per_group)
            for column in (shard.scale, shard.error, shard.norm)
        )
        self.dead = (error.view(-1) == DEAD).nonzero()[:, 0]  # deleted, or no rows
        self.most_scale = scale.amax(1)[:, None]  # that of all rows, most often
        self.least_scale = scale.masked_fill(error == DEAD, torch.inf).amin(1)[:, None]
        self.error = error.amax(1).clamp_min(0)[:, None]
        self.norm = norm.amax(1)[:, None]
        self.inverse = torch.where(self.most_scale > 0, 1 / self.most_scale, 0)
        self.minus_norm = -self.norm * self.inverse
        self.minus_error = -self.error * self.inverse


class _Asked:
    """Some queries, the k best lower bounds of each so far, and the rows that may be better."""

    def __init__(self, coded: CodedQueries, which: IdArray, k: int, left: bool) -> None:
        self.count = len(which)
        codes, self._scale, self._error = (
            torch.from_numpy(column[which])
            for column in (coded.coded.codes, coded.coded.scale, coded.coded.error)
        )
        self._left = 1 < self.count < FEW and left
        self._codes = codes if self._left else codes.T.contiguous()
        self._inverse = 1 / self._scale
        self._relative_error = self._error * self._inverse
        self._first = int(which[0])
        self._centre = coded.centre[which]
        self._k = k
        self._best = torch.full((self.count, k), -torch.inf)
        self._kth = torch.full((self.count,), -torch.inf)
        self._set_threshold(self._kth)
        self._products = torch.empty(0, dtype=torch.int32)
        self._hits: list[tuple[Tensor, Tensor, Tensor]] = []
        self._num_hits = 0

    def _set_threshold(self, threshold: Tensor) -> None:
        self._threshold = threshold
        # If it is above 0. Infinity would let nothing pass.
        self._lowered = (threshold * (LOWER * self._inverse)).clamp_max(MOST)
        # Of how many groups lower bounds are wanted: as many as results, until there is one.
        self.seeds = self._k if bool((threshold == -torch.inf).any()) else 0

    @property
    def full(self) -> bool:
        """Whether there are rows enough to look at them, which may raise the threshold."""
        return self._num_hits >= self.count * max(1, self._k // 4)

    def scan(self, block: _Block) -> None:
        """Note the rows of a block that may be among the best."""
        groups, peaks = self._groups(block)
        if self.seeds:
            self._seed(block, peaks)
        limit = self._limit(block)
        query, group = (peaks >= limit).T.nonzero(as_tuple=True)
        opened = groups[query, group]  # (hits, per_group)
        hit, member = (opened >= limit[group, query][:, None]).nonzero(as_tuple=True)
        row = group[hit] * block.per_group + member + block.start
        self._hits.append((opened[hit, member], query[hit], row))
        self._num_hits += len(row)

    def _groups(self, block: _Block) -> tuple[Tensor, Tensor]:
        """Products (Q, groups, per_group), and the largest of each group (groups, Q).

        The next call overwrites them.
        """
        size = len(block.codes) * self.count
        if size > len(self._products):
            self._products = torch.empty(size, dtype=torch.int32)
        products = self._products[:size]
        if self._left:
            products = products.view(self.count, -1)
            torch._int_mm(self._codes, block.codes.T, out=products)
            if len(block.dead):
                products[:, block.dead] = NEVER
            groups = products.view(self.count, -1, block.per_group)
            return groups, groups.amax(2).T
        products = products.view(-1, self.count)
        torch._int_mm(block.codes, self._codes, out=products)
        if len(block.dead):
            products[block.dead] = NEVER
        groups = products.view(-1, block.per_group, self.count)
        return groups.permute(2, 0, 1), groups.amax(1)

    def _seed(self, block: _Block, peaks: Tensor) -> None:
        """Make a threshold by the best row of each group, before rows are looked at."""
        scale = torch.where(peaks > 0, block.least_scale, block.most_scale)
        # By the query's scale first: products times that of a row may be beyond fp32.
        lower = peaks * self._scale * scale - block.norm * self._error - block.error
        lower = lower.masked_fill(peaks == NEVER, -torch.inf).T
        kth = torch.cat([self._best, lower], 1).topk(self._k, sorted=False).values.amin(1)
        self._set_threshold(torch.maximum(self._threshold, kth))

    def _limit(self, block: _Block) -> Tensor:
        """The least product (groups, Q) with which a row of a group reaches the threshold.

        With the largest scale among them, which is not the most that a product below 0 stands for.
        """
        limit = block.inverse * self._lowered
        limit.addcmul_(block.minus_norm, self._relative_error)
        limit.addcmul_(block.minus_error, self._inverse)
        # Not a number where the scale is 0 and there is no threshold.
        return torch.where(limit > 0, limit, NEVER / 2)

    def take(self, shard: Shard) -> Candidates:
        """Those of the rows that may be among the best by bounds of their own.

        They are of this shard, and are not given again.
        """
        if not self._num_hits:
            return NOTHING
        product, query, row = (torch.cat(column) for column in zip(*self._hits, strict=True))
        self._hits, self._num_hits = [], 0
        scale, error, norm = (
            torch.from_numpy(column)[row] for column in (shard.scale, shard.error, shard.norm)
        )
        middle = product * self._scale[query] * scale
        width = norm * self._error[query] + error
        reached = middle + width >= self._threshold[query]
        query, lower, upper = query[reached], (middle - width)[reached], (middle + width)[reached]
        self._raise_threshold(query, lower)
        found = query.numpy()
        centre = self._centre[found]
        return Candidates(
            found + self._first,
            row[reached].numpy() + shard.first,
            lower.double().numpy() + centre,
            upper.double().numpy() + centre,
        )

    def _raise_threshold(self, query: Tensor, lower: Tensor) -> None:
        """Take account of lower bounds (n,) of rows."""
        better = lower > self._kth[query]
        query, order = query[better].sort(stable=True)
        if not len(query):
            return
        rank = torch.from_numpy(rank_in_query(query.numpy()))
        fresh = torch.full((self.count, int(rank.max()) + 1), -torch.inf)
        fresh[query, rank] = lower[better][order]
        raised = query[rank == 0]
        best = torch.cat([self._best[raised], fresh[raised]], 1)
        self._best[raised] = best.topk(self._k, sorted=False).values
        self._kth[raised] = self._best[raised].amin(1)
        self._set_threshold(torch.maximum(self._threshold, self._kth))
