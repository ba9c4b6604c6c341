"""Rows and queries as int8 codes, with bounds of how far a score by codes can be from the true one.

A row x is written as `x = centre + R' (s p + r)`: R a random orthogonal matrix, p int8, s a scale,
r what rounding left. A unit query q is `R q = t c + u`. With e = |r| and n = s |p|

    q.x - q.centre = t s (c.p) + u.(s p) + (R q).r,   so   |error| <= |u| n + e

by Cauchy and Schwarz. The rotation spreads a vector over all dimensions, which makes r small; the
centre makes n small, and what it adds to a score is the same for all rows of a query. Nothing is
assumed of either: R is orthogonal only up to rounding, and by how much is measured in fp64.

Where few directions hold most of the energy, R brings these first, the head (principal components,
mixed at random among themselves), and the others, the tail, behind them; codes of the head stand
for 2 s p, as its values are larger. Then q.x - q.centre is at most |tail of R q| |tail of
R (x - centre)| from what the head alone says, and a scan need not read the tails of most rows. The
tail has a front, directions of more energy, and a back: with the front read, the same holds of the
backs.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from twotower.retrieval.index import AnyFloatArray, Float64Array, FloatArray, IdArray

Codes = npt.NDArray[np.int8]

CODED_DIM = 1 << 16  # the largest with which sums of products stay in 32 bits
BLOCK = 512  # dimensions rotated together: the work is rows x dim x block
CHUNK = 2048  # rows quantised at a time: 8 MB in fp64 at 512 dimensions
CENTRE_ROWS = 65_536  # rows that the centre is the mean of
SEED = 20_240_607
TAIL_ENERGY = 0.17  # of all energy, at most; less makes the bound tighter and the head longer
BACK_ENERGY = 0.4  # of the tail's, at most
HEAD_STEP = 16  # dimensions
HEAD_SCALE = 2  # scan.c shifts by two bits: twice for rows and for queries
LONGEST_HEAD = 0.5  # of all dimensions: beyond, too little is left to be saved
AXES_DIM = 1024  # the largest that principal components are computed of, at 16 rows a dimension
# Of |row| + |codes|: fp32 rounding of scores by codes, ties within two fp32 steps, fp64 rounding.
ARITHMETIC = 1e-6
ROUND_UP = 1 + 2.0**-20  # what is rounded to fp32 is still a bound
SMALLEST = 2.0**-100  # below it scales are 0: no fp32 product may lose bits to underflow


class CodedRows(NamedTuple):
    """Codes (n, dim), and scale, error and norm (n,) of each row, in fp32.

    `norm` is that of all codes, `tail_norm` and `back_norm` (n,) those of the tail and of its back
    before they were coded.
    """

    codes: Codes
    scale: FloatArray
    error: FloatArray
    norm: FloatArray
    tail_norm: FloatArray
    back_norm: FloatArray

    def part(self, start: int, stop: int) -> CodedRows:
        """Some of them."""
        return CodedRows(*(getattr(self, name)[start:stop] for name in self._fields))


class QueryCodes(NamedTuple):
    """Codes (Q, dim), scales, errors, and norms of tail and back (Q,) of unit queries."""

    codes: Codes
    scale: FloatArray
    error: FloatArray
    tail_norm: FloatArray
    back_norm: FloatArray


@dataclass(frozen=True)
class Frame:
    """The centre (dim,) and the rotation: an order of dimensions, and a matrix a block of them.

    `head` is the number of dimensions before the tail: all of them where there is none. `back` is
    the number before the tail's back. `slack` bounds by how much a score changes because the
    matrices are orthogonal but for rounding.
    """

    centre: Float64Array
    order: IdArray
    blocks: tuple[FloatArray, ...]
    head: int
    back: int
    slack: float

    @classmethod
    def of(cls, rows: AnyFloatArray, seed: int = SEED, tail_energy: float | None = None) -> Frame:
        """A frame whose centre is the mean of rows (N, dim), of some of them where there are many.

        With `tail_energy`, such as TAIL_ENERGY, it has a tail that holds at most this share of all
        energy, if that leaves a head worth having. The same seed and rows give the same rotation on
        one machine; indexes keep theirs.
        """
        step = max(1, len(rows) // CENTRE_ROWS)
        centre = rows[::step].mean(axis=0, dtype=np.float64).astype(np.float32)
        rng = np.random.default_rng(seed)
        dim = rows.shape[1]
        if tail_energy is not None and dim <= AXES_DIM and len(rows) >= 4 * dim:
            axes, head, back = principal_axes(rows, centre, tail_energy)
            if head:
                mixed = [
                    _orthogonal(rng, len(part)).astype(np.float64) @ part
                    for part in np.split(axes, [head, back])
                    if len(part)
                ]
                block = np.concatenate(mixed).astype(np.float32)
                return cls.of_parts(centre, np.arange(dim), [block], head, back)
        order = rng.permutation(dim)
        edges = np.linspace(0, dim, -(-dim // BLOCK) + 1).astype(int)
        blocks = [_orthogonal(rng, size) for size in np.diff(edges)]
        return cls.of_parts(centre, order, blocks, dim, dim)

    @classmethod
    def of_parts(
        cls, centre: FloatArray, order: IdArray, blocks: Sequence[FloatArray], head: int, back: int
    ) -> Frame:
        """The frame that has these parts, all of them as a file keeps them."""
        slack = max(_distance_from_orthogonal(block) for block in blocks)
        return cls(centre.astype(np.float64), order, tuple(blocks), head, back, slack)

    @cached_property
    def columns(self) -> tuple[FloatArray, ...]:
        """The transposed matrices."""
        return tuple(np.ascontiguousarray(block.T) for block in self.blocks)

    def rotate(self, vectors: Float64Array) -> Float64Array:
        """R times each of (n, dim)."""
        mixed, rotated, start = vectors[:, self.order], np.empty_like(vectors), 0
        for block in self.blocks:
            stop = start + len(block)
            np.matmul(mixed[:, start:stop], block.T, out=rotated[:, start:stop], dtype=np.float64)
            start = stop
        return rotated

    def code_rows(
        self, rows: AnyFloatArray, together: int = 1, first: int = 0
    ) -> Iterator[tuple[int, CodedRows]]:
        """Codes of rows (N, dim), fp32 or fp16, a few at a time with the number of the first.

        So many rows `together` have one scale, that of their largest value; `first` is the place
        of the first row among them.
        """
        for start in range(0, len(rows), CHUNK):
            some = rows[start : start + CHUNK].astype(np.float64)
            yield start, self._code(some, together, (first + start) % together)

    def _code(self, rows: Float64Array, together: int, first: int) -> CodedRows:
        length = _norms(rows)
        rows -= self.centre
        moved = _norms(rows)
        made = self._quantise(self.rotate(rows), together, first)
        error, norm = made.error, made.norm
        error = error + self.slack * (error + moved) + ARITHMETIC * (norm + error + moved + length)
        bounds = _above(error), _above(norm), made.tail_norm, made.back_norm
        return CodedRows(made.codes, made.scale, *bounds)

    def code_rotated(self, rotated: Float64Array) -> QueryCodes:
        """Codes (Q, dim), scales t, errors |u| and so on (Q,) of rotated queries of unit norm.

        `rotated` is overwritten.
        """
        made = self._quantise(rotated)
        bounds = _above(made.error), made.tail_norm, made.back_norm
        return QueryCodes(made.codes, made.scale, *bounds)

    def _quantise(self, rotated: Float64Array, together: int = 1, first: int = 0) -> _Quantised:
        """Codes, the head's at twice the scale; `rotated` is overwritten."""
        steps = np.ones(rotated.shape[1])
        if self.head < len(steps):
            steps[: self.head] = HEAD_SCALE
        beyond = [_above(_norms(rotated[:, start:])) for start in (self.head, self.back)]
        largest = (np.abs(rotated) / steps).max(axis=1)
        if together > 1:
            starts = np.r_[0, together - first : len(largest) : together]
            sizes = np.diff(starts, append=len(largest))
            largest = np.maximum.reduceat(largest, starts).repeat(sizes)
        return _Quantised(*quantise(rotated, steps, largest), *beyond)


class _Quantised(NamedTuple):
    """Codes, scales, norms of what is lost and of what is kept, of the tail and of its back."""

    codes: Codes
    scale: FloatArray
    error: Float64Array
    norm: Float64Array
    tail_norm: FloatArray
    back_norm: FloatArray


def principal_axes(
    rows: AnyFloatArray, centre: FloatArray, tail_energy: float
) -> tuple[Float64Array, int, int]:
    """The principal axes (dim, dim) of rows, a row each, and how many come before tail and back.

    Taken from 16 rows a dimension. The head is 0 where too many axes hold energy.
    """
    dim = rows.shape[1]
    some = rows[:: max(1, len(rows) // (16 * dim))].astype(np.float64) - centre
    energy, axes = np.linalg.eigh(some.T @ some)  # ascending
    energy = np.maximum(energy[::-1], 0)
    left = 1 - np.cumsum(energy) / max(energy.sum(), SMALLEST)
    steps = range(HEAD_STEP, dim, HEAD_STEP)
    tails = (place for place in steps if left[place - 1] <= tail_energy)
    backs = (place for place in steps if left[place - 1] <= BACK_ENERGY * tail_energy)
    head, back = next(tails, dim), next(backs, dim)
    if head > int(dim * LONGEST_HEAD):
        return axes.T[::-1], 0, dim
    return axes.T[::-1], head, max(back, head + HEAD_STEP) if back < dim else dim


def _norms(vectors: Float64Array) -> Float64Array:
    """Of each of (n, dim)."""
    norms: Float64Array = np.sqrt(np.einsum("nd,nd->n", vectors, vectors))
    return norms


def _above(values: Float64Array) -> FloatArray:
    """Not less than the values, in fp32."""
    return (values * ROUND_UP + SMALLEST).astype(np.float32)


def quantise(
    values: Float64Array, steps: Float64Array, largest: Float64Array
) -> tuple[Codes, FloatArray, Float64Array, Float64Array]:
    """Codes p of -127 to 127, scales s, norms of what is lost and of what is kept, row by row.

    `steps` (dim,) times s is what p is multiplied by, and `largest` (n,) what 127 stands for
    without the steps. `values` (n, dim) is overwritten.
    """
    scale = (largest / 127).astype(np.float32)
    scale[scale < SMALLEST] = 0
    wide = scale.astype(np.float64)
    near = np.rint(values / steps / np.where(wide > 0, wide, np.inf)[:, None])
    np.clip(near, -127, 127, out=near)
    codes = near.astype(np.int8)
    near *= steps
    near *= wide[:, None]
    norm = _norms(near)
    values -= near
    return codes, scale, _norms(values), norm


def _orthogonal(rng: np.random.Generator, size: int) -> FloatArray:
    """A random orthogonal matrix, uniform over all (Mezzadri, 2007)."""
    q, r = np.linalg.qr(rng.standard_normal((size, size)))
    return np.ascontiguousarray(q * np.sign(np.diag(r)), np.float32)


def _distance_from_orthogonal(block: FloatArray) -> float:
    """The Frobenius norm of R'R - 1, and a little for the rounding of `rotate` in fp64."""
    wide = block.astype(np.float64)
    return float(np.linalg.norm(wide.T @ wide - np.eye(len(wide)))) + 1e-12
