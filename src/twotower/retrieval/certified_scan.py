"""Scans by int8 codes with a certificate (certificate.py): in C, tier 1, or with torch, tier 2."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np
import numpy.typing as npt
import torch

from twotower.config import Metric
from twotower.retrieval import native
from twotower.retrieval.arrays import WRITE_ROWS, Array, Stream, whole
from twotower.retrieval.candidates import Best, Candidates
from twotower.retrieval.certificate import CodedRows, Codes, Float64Array, Frame
from twotower.retrieval.codes import CodeStore
from twotower.retrieval.index import AnyFloatArray, IdArray, divisors
from twotower.retrieval.rows import Rows

NATIVE_QUERIES = 512  # queries a call: what a thread keeps of them stays in the cache
KEPT = 1 << 22  # lower bounds and candidates that all threads keep together, at most


class Coded:
    """The codes of an index's rows and the frame that they are relative to."""

    def __init__(self, dim: int, packed: bool) -> None:
        self.store = CodeStore(dim, packed)
        self.frame: Frame | None = None

    def append(self, rows: AnyFloatArray) -> None:
        """Add the codes of rows; the first ones decide on the centre."""
        if not len(rows):
            return
        if self.frame is None:
            self.frame = Frame.of(rows)
        self.store.reserve(len(rows))
        for _, coded in self.frame.code_rows(rows):
            self.store.append(coded)

    def arrays(self, kept: npt.NDArray[np.bool_]) -> dict[str, Stream]:
        """Codes and frame as a file holds them, of the positions of a mask (N,)."""
        if self.frame is None:
            return {}
        frame: dict[str, Array] = {
            "centre": self.frame.centre.astype(np.float32),
            "order": self.frame.order,
            **{f"rotation.{i:03d}": block for i, block in enumerate(self.frame.blocks)},
        }
        made = {name: whole(array) for name, array in frame.items()}
        shape = (int(kept.sum()), len(self.frame.order))
        made["codes"] = Stream(np.dtype(np.int8), shape, self._codes(kept))
        for name in CodedRows._fields[1:]:
            column = [getattr(shard, name)[: shard.used] for shard in self.store.shards]
            made[name] = whole(np.concatenate(column)[kept])
        return made

    def _codes(self, kept: npt.NDArray[np.bool_]) -> Iterator[Codes]:
        for start in range(0, len(kept), WRITE_ROWS):
            here = kept[start : start + WRITE_ROWS]
            codes = self.store.rows(start, start + len(here)).codes
            yield codes if here.all() else codes[here]

    def take(self, arrays: Mapping[str, Array]) -> None:
        """Take over what `arrays` gave."""
        blocks = [np.array(arrays[name]) for name in sorted(arrays) if name.startswith("rotation.")]
        self.frame = Frame.of_parts(np.array(arrays["centre"]), np.array(arrays["order"]), blocks)
        rows = CodedRows(*(arrays[name] for name in CodedRows._fields))
        for start in range(0, len(rows.scale), WRITE_ROWS):
            self.store.reserve(len(rows.scale) - start)
            self.store.append(rows.part(start, start + WRITE_ROWS))

    def queries(self, queries: Float64Array) -> native.CodedQueries:
        """Queries (Q, dim), none of them zero, with their codes."""
        assert self.frame is not None
        norm = divisors(queries)
        unit = queries / norm[:, None]
        codes, scale, error = self.frame.code_queries(unit)
        padded = np.zeros((len(codes), self.store.width), np.int8)
        padded[:, : codes.shape[1]] = codes
        centre = unit @ self.frame.centre
        return native.CodedQueries(queries, norm, centre, padded, scale, error)


class CodedScan:
    """What the scans by codes keep beside the rows: their codes."""

    def __init__(self, rows: Rows, packed: bool) -> None:
        self._rows = rows
        self.coded = Coded(rows.dim, packed)

    @property
    def nbytes(self) -> int:
        """Bytes of the codes and their bounds."""
        return self.coded.store.nbytes

    def append(self, rows: AnyFloatArray) -> None:
        """Code rows that were added to the index."""
        self.coded.append(rows)

    def delete(self, positions: IdArray) -> None:
        """Never find these rows again."""
        self.coded.store.delete(positions)


class NativeScan(CodedScan):
    """The scan of scan.c."""

    def __init__(self, rows: Rows, level: int | None = None) -> None:
        super().__init__(rows, packed=True)
        self._level = native.level() if level is None else level

    def query_block(self, k: int) -> int:
        """Queries that are best searched at a time."""
        return max(1, min(NATIVE_QUERIES, KEPT // (k * torch.get_num_threads())))

    def search(self, queries: Float64Array, k: int) -> Best:
        """The best k rows of queries (Q, dim), none of them zero, in fp64; k <= rows."""
        found = native.search(
            self.coded.store.shards,
            [(part.start, part.rows) for part in self._rows.parts],
            self._rows.ids.array,
            self.coded.queries(queries),
            k,
            cosine=self._rows.metric is Metric.cosine,
            threads=torch.get_num_threads(),
            level=self._level,
        )
        query = np.repeat(np.arange(len(queries)), k)
        score = found.score.reshape(-1)
        return Best(Candidates(query, found.position.reshape(-1), score, score), score)
