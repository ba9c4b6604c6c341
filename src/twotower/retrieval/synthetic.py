"""Vectors like those of CLIP, of any number and dimension, chunk by chunk.

A row is `unit(m + 0.75 c + 0.6 e)`. `m` is a direction that all rows share, the cone in which a
tower's outputs lie: the mean cosine of two rows is about 0.5. `c` is the centre of a cluster, one
for every 50 rows, and `e` is the row's own; both are unit vectors of Gaussian noise whose energy
falls as 1 / i with the dimension i, which is about the spectrum of real embeddings.

A picture as a query is a row without the rows' mean, half as much noise, and 1.5 times the mean: it
lies in the rows' cone, near one of them. A text lies in a cone of its own, the modality gap (Liang
et al. 2022): the same without the mean, and twice another direction. Its cosine is about 0 with a
row, and about 0.3 with the nearest.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from twotower.retrieval.index import FloatArray, unit_rows
from twotower.retrieval.scan.codes import huge_pages

CLUSTER = 50  # rows of one cluster, on average
CHUNK = 65_536
NEAR_CHUNKS = 4  # chunks that queries are near to: all others would have to be made for them


class ClipLike:
    """Unit rows (count, dim), the same for the same seed whichever chunks are asked for."""

    def __init__(self, count: int, dim: int, seed: int = 0) -> None:
        self.count, self.dim, self.seed = count, dim, seed
        rng = np.random.default_rng([seed, 0])
        self._mean = unit_rows(rng.standard_normal((1, dim), np.float32))
        self._centres = noise(rng, -(-count // CLUSTER), dim)

    def chunks(self) -> Iterator[FloatArray]:
        """All rows, 65,536 at a time."""
        for number in range(-(-self.count // CHUNK)):
            yield self.chunk(number)

    def chunk(self, number: int) -> FloatArray:
        """The rows of one chunk (n, dim)."""
        size = min(CHUNK, self.count - number * CHUNK)
        rng = np.random.default_rng([self.seed, 1, number])
        chosen = rng.integers(0, len(self._centres), size)
        own = noise(rng, size, self.dim)
        rows = self._centres[chosen]
        rows *= 0.75
        own *= 0.6
        rows += own
        rows += self._mean
        return unit_rows(rows)

    def head(self, count: int) -> FloatArray:
        """The first rows, which are a fair sample: no row knows its place."""
        chunks = [self.chunk(number) for number in range(-(-min(count, self.count) // CHUNK))]
        return np.concatenate(chunks)[:count]

    def rows(self) -> FloatArray:
        """All rows in one array, on huge pages where the system has them."""
        rows = huge_pages(4 * self.count * self.dim).view(np.float32).reshape(self.count, self.dim)
        for number, chunk in enumerate(self.chunks()):
            rows[number * CHUNK : number * CHUNK + len(chunk)] = chunk
        return rows

    def queries(self, count: int, cross: bool) -> FloatArray:
        """Unit queries (count, dim): pictures, or with `cross` texts."""
        last = -(-self.count // CHUNK) - 1
        numbers = dict.fromkeys(np.linspace(0, last, NEAR_CHUNKS).astype(int).tolist())
        rows = np.concatenate([self.chunk(number) for number in numbers])
        return queries_of(rows, count, cross, self.seed)


def clip_like(count: int, dim: int, seed: int = 0) -> FloatArray:
    """Unit rows (count, dim) in one array; see the module."""
    return ClipLike(count, dim, seed).rows()


def queries_of(rows: FloatArray, count: int, cross: bool, seed: int = 0) -> FloatArray:
    """Unit queries (count, dim) near some of the rows: pictures, or with `cross` texts."""
    dim = rows.shape[1]
    rng = np.random.default_rng([seed, 2, int(cross)])
    mean = rows[:1000].mean(axis=0)
    near = unit_rows(rows[rng.integers(0, len(rows), count)] - mean)
    cone = unit_rows(rng.standard_normal((1, dim), np.float32))
    return unit_rows(near + 0.5 * noise(rng, count, dim) + (2 * cone if cross else 1.5 * mean))


def noise(rng: np.random.Generator, count: int, dim: int) -> FloatArray:
    """Unit vectors (count, dim) whose energy falls as 1 / i with the dimension i."""
    drawn = rng.standard_normal((count, dim), np.float32)
    drawn *= np.arange(1, dim + 1, dtype=np.float32) ** -0.5
    drawn /= np.sqrt(np.einsum("ij,ij->i", drawn, drawn))[:, None]
    return drawn
