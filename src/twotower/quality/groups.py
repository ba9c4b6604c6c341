"""Groups of copies: exact by hash, near by thumb; which image of a group stays.

An image of one split that is also in another, as it is or nearly, is a leak.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch

from twotower.quality.near import NearPairs, find_near
from twotower.quality.neighbours import Pairs
from twotower.quality.picture import BLANK, SIDE
from twotower.quality.scan import thumbs_of

Rows = npt.NDArray[np.int64]

PART = 4096  # thumbs at a time
# A group in several splits stays in the first of them in this order, and train comes last of all.
HELD_OUT = ("test", "val")


class Copy(NamedTuple):
    """An image that repeats another.

    Attributes:
        row: its row. of: the row that it repeats. kind: one of `doctor_config.COPIES`.
        similarity: 1 for equal pixels, else how well the two agree.
    """

    row: int
    of: int
    kind: str
    similarity: float


class Grouped(NamedTuple):
    """`group` (N,) numbers each image's group by its first row; `copies` are in row order."""

    group: Rows
    copies: list[Copy]


def find_copies(
    found: pa.Table,
    usable: npt.NDArray[np.bool_],
    splits: Sequence[str],
    least: float,
    device: torch.device | None = None,
) -> Grouped:
    """Every image that repeats another one.

    Args:
        found: what the scan says of each image. usable: which images to look at, none of them with
            a fault. splits: the split of each.
        least: similarity from which on two images are near duplicates.
    """
    exact = same_pixels(found, usable)
    rows = np.flatnonzero(usable & (exact == np.arange(len(found))))
    thumbs = thumbs_of(found.take(pa.array(rows)))
    varied = np.zeros(len(rows), bool)
    for first in range(0, len(rows), PART):
        part = slice(first, first + PART)
        varied[part] = thumbs[part, : SIDE**2].std(1) >= BLANK
    near = find_near(thumbs[varied], least, device)
    near = NearPairs(rows[varied][near.rows], near.similarity)
    links = np.concatenate([near.rows, np.stack([exact, np.arange(len(found))], 1)])
    group = components(links, len(found))
    return Grouped(group, sorted(_copies(found, group, exact, near, splits)))


def same_pixels(found: pa.Table, usable: npt.NDArray[np.bool_]) -> Rows:
    """For each usable row the first one with the same pixels, for others itself: (N,)."""
    encoded = found["pixels_hash"].combine_chunks().dictionary_encode()
    if isinstance(encoded, pa.ChunkedArray):
        encoded = encoded.combine_chunks()
    codes = encoded.indices.fill_null(-1).to_numpy(zero_copy_only=False).astype(np.int64)
    codes[~usable] = -1
    every = np.arange(len(found))
    first = np.full(len(encoded.dictionary) + 1, len(found))
    np.minimum.at(first, codes, every)
    return np.where(codes < 0, every, first[codes])


def components(links: Pairs, count: int) -> Rows:
    """The least row that each row is linked with, directly or through others: (count,)."""
    least = np.arange(count)
    while len(links):
        before = least.copy()
        low = least[links].min(1)
        for end in links.T:
            np.minimum.at(least, end, low)
            np.minimum.at(least, before[end], low)
        least = least[least]
        if np.array_equal(least, before):
            break
    return least


def _copies(
    found: pa.Table, group: Rows, exact: Rows, near: NearPairs, splits: Sequence[str]
) -> Iterator[Copy]:
    similar: dict[int, dict[int, float]] = {}
    for (a, b), value in zip(near.rows.tolist(), near.similarity.tolist(), strict=True):
        similar.setdefault(a, {})[b] = value
        similar.setdefault(b, {})[a] = value
    pixels = found["width"].to_numpy().astype(np.int64) * found["height"].to_numpy()
    sizes = found["size"].to_numpy()
    order = np.argsort(group, kind="stable")
    for members in np.split(order, np.flatnonzero(np.diff(group[order])) + 1):
        if len(members) < 2:
            continue
        rows = members.tolist()
        home = min((splits[row] for row in rows), key=_rank)
        at_home = [row for row in rows if splits[row] == home]
        best = max(at_home, key=lambda row: (pixels[row], sizes[row], -row))
        for row in rows:
            if row != best:
                leaks = splits[row] != home
                of, value = _closest(row, at_home if leaks else [best], exact, similar)
                near_or_not = "" if exact[row] == exact[of] else "near_"
                yield Copy(row, of, near_or_not + ("leak" if leaks else "duplicate"), value)


def _rank(split: str) -> int:
    if split in HELD_OUT:
        return HELD_OUT.index(split)
    return len(HELD_OUT) + (split == "train")


def _closest(
    row: int, others: Sequence[int], exact: Rows, similar: dict[int, dict[int, float]]
) -> tuple[int, float]:
    """Which of `others` a row repeats, and how well they agree.

    Where only rows between them are near both, it is the last one, by how well its nearest agrees.
    """
    near = similar.get(int(exact[row]), {})
    values = {
        other: 1.0 if exact[other] == exact[row] else near.get(int(exact[other]), -1.0)
        for other in others
    }
    of = max(values, key=lambda other: values[other])
    return of, values[of] if values[of] >= 0 else max(near.values(), default=1.0)
