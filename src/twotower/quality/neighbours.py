"""Pairs of near vectors among up to millions, in memory that grows with their number alone.

Up to `EXACT` vectors every pair is looked at, in blocks. Above, vectors are sorted into about
sqrt(N) lists by spherical k-means, and a query looks into the lists nearest to it (an inverted
file: Jegou, Douze, Schmid 2011), since near duplicates are far nearer than a list is wide.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

EXACT = 20_000
PROBES = 8  # lists that a query looks into
MOST = 32  # neighbours that a query keeps in a block, lest a thousand copies make a million pairs
QUERIES, MEMBERS = 1024, 8192  # a block
SAMPLE, ROUNDS = 64, 8  # of k-means: vectors a list, iterations

Pairs = npt.NDArray[np.int64]
Queries = Callable[[int, int], Tensor]


def near_pairs(
    base: Tensor, queries: Queries, threshold: float, *, exact: int = EXACT, seed: int = 0
) -> Pairs:
    """Pairs i < j of rows of `base` with a query of the one near the other: (P, 2), sorted.

    Args:
        base: (N, D) unit vectors.
        queries: gives for the rows from a first to a last (b, Q, D) unit vectors, the row's own and
            perhaps others.
        threshold: least cosine of a query and a vector.
        exact: most rows of which every pair is looked at.
    """
    count = len(base)
    lists = 1 if count <= exact else int(count**0.5)
    centres = _centres(base, lists, seed)
    members = _members(base, centres)
    step = max(1, QUERIES if lists == 1 else 4 * QUERIES)
    found = [np.empty(0, np.int64)]
    for first in range(0, count, step):
        asked = queries(first, min(first + step, count))
        rows = torch.arange(first, first + len(asked), device=base.device)
        rows = rows.repeat_interleave(asked.shape[1])
        for block, to in _blocks(asked.flatten(0, 1), centres, members):
            i, j = _near(asked.flatten(0, 1)[block] @ base[to].T, threshold)
            i, j = rows[block[i]], to[j]
            keys = torch.minimum(i, j) * count + torch.maximum(i, j)
            found.append(torch.unique(keys[i != j]).cpu().numpy())
    every = np.unique(np.concatenate(found))
    return np.stack([every // max(count, 1), every % max(count, 1)], 1)


def _near(cosines: Tensor, threshold: float) -> tuple[Tensor, Tensor]:
    """Places (query, member) of the cosines at or above a threshold, at most `MOST` a query."""
    near = cosines >= threshold
    busy = (near.sum(1) > MOST).nonzero()[:, 0]
    if len(busy):
        best = cosines[busy].topk(MOST).indices
        near[busy] = torch.zeros_like(near[busy]).scatter_(1, best, True)
    i, j = near.nonzero(as_tuple=True)
    return i, j


def _blocks(
    asked: Tensor, centres: Tensor, members: list[Tensor]
) -> Iterator[tuple[Tensor, Tensor]]:
    """Which queries meet which members, both as numbers."""
    if len(members) == 1:
        every = torch.arange(len(asked), device=asked.device)
        for queries in torch.split(every, QUERIES):
            for part in torch.split(members[0], MEMBERS):
                yield queries, part
        return
    probed = (asked @ centres.T).topk(min(PROBES, len(members))).indices.flatten()
    order = probed.argsort(stable=True)
    sizes = torch.bincount(probed, minlength=len(members)).tolist()
    for members_of, queries in zip(members, torch.split(order, sizes), strict=True):
        for part in torch.split(members_of, MEMBERS) if len(queries) else ():
            yield queries // (len(probed) // len(asked)), part


def _centres(base: Tensor, lists: int, seed: int) -> Tensor:
    """Unit centres (lists, D) of spherical k-means on a seeded sample."""
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randperm(len(base), generator=generator)[: SAMPLE * lists].to(base.device)
    sample = base[drawn]
    centres = sample[:lists].clone()
    for _ in range(ROUNDS if lists > 1 else 0):
        nearest = _nearest(sample, centres)
        centres.index_add_(0, nearest, sample)
        centres /= centres.norm(dim=1, keepdim=True).clamp_min(1e-12)
    return centres


def _nearest(vectors: Tensor, centres: Tensor) -> Tensor:
    return torch.cat([(part @ centres.T).argmax(1) for part in torch.split(vectors, QUERIES)])


def _members(base: Tensor, centres: Tensor) -> list[Tensor]:
    """The rows of each list."""
    if len(centres) <= 1:
        return [torch.arange(len(base), device=base.device)]
    nearest = _nearest(base, centres)
    sizes = torch.bincount(nearest, minlength=len(centres)).tolist()
    return list(torch.split(nearest.argsort(stable=True), sizes))
