"""Rows and queries as int8 codes, with bounds of how far a score by codes can be from the true one.

A row x is written as `x = centre + R' (s p + r)`: R a random orthogonal matrix, p int8, s a scale,
r what rounding left. A unit query q is `R q = t c + u`. With e = |r| and n = s |p|

    q.x - q.centre = t s (c.p) + u.(s p) + (R q).r,   so   |error| <= |u| n + e

by Cauchy and Schwarz. The rotation spreads a vector over all dimensions, which makes r small; the
centre makes n small, and what it adds to a score is the same for all rows of a query. Nothing is
assumed of either: R is orthogonal only up to rounding, and by how much is measured in fp64.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from twotower.retrieval.index import AnyFloatArray, FloatArray, IdArray

Float64Array = npt.NDArray[np.float64]
Codes = npt.NDArray[np.int8]

BLOCK = 512  # dimensions rotated together: the work is rows x dim x block
CHUNK = 2048  # rows quantised at a time: 8 MB in fp64 at 512 dimensions
CENTRE_ROWS = 65_536  # rows that the centre is the mean of
SEED = 20_240_607
# Of |row| + |codes|: fp32 rounding of scores by codes, ties within two fp32 steps, fp64 rounding.
ARITHMETIC = 1e-6
ROUND_UP = 1 + 2.0**-20  # what is rounded to fp32 is still a bound
SMALLEST = 2.0**-100  # below it scales are 0: no fp32 product may lose bits to underflow


class CodedRows(NamedTuple):
    """Codes (n, dim), and scale, error and norm (n,) of each row, in fp32."""

    codes: Codes
    scale: FloatArray
    error: FloatArray
    norm: FloatArray

    def part(self, start: int, stop: int) -> CodedRows:
        """Some of them."""
        return CodedRows(
            self.codes[start:stop],
            self.scale[start:stop],
            self.error[start:stop],
            self.norm[start:stop],
        )


@dataclass(frozen=True)
class Frame:
    """The centre (dim,) and the rotation: an order of dimensions, and a matrix a block of them.

    `slack` bounds by how much a score changes because the matrices are orthogonal but for rounding.
    """

    centre: Float64Array
    order: IdArray
    blocks: tuple[FloatArray, ...]
    slack: float

    @classmethod
    def of(cls, rows: AnyFloatArray, seed: int = SEED) -> Frame:
        """A frame whose centre is the mean of rows (N, dim), of some of them where there are many.

        The same seed and dimension give the same rotation on one machine; indexes keep theirs.
        """
        step = max(1, len(rows) // CENTRE_ROWS)
        centre = rows[::step].mean(axis=0, dtype=np.float64)
        rng = np.random.default_rng(seed)
        dim = rows.shape[1]
        order = rng.permutation(dim)
        edges = np.linspace(0, dim, -(-dim // BLOCK) + 1).astype(int)
        blocks = [_orthogonal(rng, size) for size in np.diff(edges)]
        # fp32 and no finer: it is what `of_parts` gets when an index is loaded.
        return cls.of_parts(centre.astype(np.float32), order, blocks)

    @classmethod
    def of_parts(
        cls, centre: FloatArray, order: IdArray, blocks: list[FloatArray] | tuple[FloatArray, ...]
    ) -> Frame:
        """The frame that has these parts."""
        slack = max(_distance_from_orthogonal(block) for block in blocks)
        return cls(centre.astype(np.float64), order, tuple(blocks), slack)

    def rotate(self, vectors: Float64Array) -> Float64Array:
        """R times each of (n, dim)."""
        mixed, rotated, start = vectors[:, self.order], np.empty_like(vectors), 0
        for block in self.blocks:
            stop = start + len(block)
            np.matmul(mixed[:, start:stop], block.T, out=rotated[:, start:stop], dtype=np.float64)
            start = stop
        return rotated

    def code_rows(self, rows: AnyFloatArray) -> Iterator[tuple[int, CodedRows]]:
        """Codes of rows (N, dim), fp32 or fp16, a few at a time with the number of the first."""
        for start in range(0, len(rows), CHUNK):
            yield start, self._code(rows[start : start + CHUNK].astype(np.float64))

    def _code(self, rows: Float64Array) -> CodedRows:
        length = np.sqrt(np.einsum("nd,nd->n", rows, rows))
        rows -= self.centre
        moved = np.sqrt(np.einsum("nd,nd->n", rows, rows))
        rotated = self.rotate(rows)
        codes, scale, error, norm = quantise(rotated)
        error = error + self.slack * (error + moved) + ARITHMETIC * (norm + error + moved + length)
        return CodedRows(
            codes,
            scale,
            (error * ROUND_UP + SMALLEST).astype(np.float32),
            (norm * ROUND_UP).astype(np.float32),
        )

    def code_queries(self, unit: Float64Array) -> tuple[Codes, FloatArray, FloatArray]:
        """Codes (Q, dim), scales t and errors |u| (Q,) of queries of unit norm."""
        codes, scale, error, _ = quantise(self.rotate(unit))
        return codes, scale, (error * ROUND_UP + SMALLEST).astype(np.float32)


def quantise(values: Float64Array) -> tuple[Codes, FloatArray, Float64Array, Float64Array]:
    """Codes of -127 to 127, scales, norms of what is lost, norms of what is kept; row by row.

    `values` is overwritten.
    """
    scale = (np.abs(values).max(axis=1) / 127).astype(np.float32)
    scale[scale < SMALLEST] = 0
    wide = scale.astype(np.float64)
    near = np.rint(values / np.where(wide > 0, wide, np.inf)[:, None])
    np.clip(near, -127, 127, out=near)
    codes = near.astype(np.int8)
    near *= wide[:, None]
    norm = np.sqrt(np.einsum("nd,nd->n", near, near))
    values -= near
    return codes, scale, np.sqrt(np.einsum("nd,nd->n", values, values)), norm


def _orthogonal(rng: np.random.Generator, size: int) -> FloatArray:
    """A random orthogonal matrix, uniform over all (Mezzadri, 2007)."""
    q, r = np.linalg.qr(rng.standard_normal((size, size)))
    return np.ascontiguousarray(q * np.sign(np.diag(r)), np.float32)


def _distance_from_orthogonal(block: FloatArray) -> float:
    """The Frobenius norm of R'R - 1, and a little for the rounding of `rotate` in fp64."""
    wide = block.astype(np.float64)
    return float(np.linalg.norm(wide.T @ wide - np.eye(len(wide)))) + 1e-12
