"""What the scans by int8 codes (certificate.py) keep: in C, tier 1, or with torch, tier 2."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

import numpy as np
import numpy.typing as npt

from twotower.retrieval.arrays import WRITE_ROWS, Array, Stream, whole
from twotower.retrieval.index import AnyFloatArray, Float64Array, IdArray, divisors
from twotower.retrieval.rows import Rows
from twotower.retrieval.scan import native
from twotower.retrieval.scan.candidates import GROUP
from twotower.retrieval.scan.certificate import CodedRows, Codes, Frame
from twotower.retrieval.scan.codes import CodeStore


class Coded:
    """The codes of an index's rows and the frame that they are relative to."""

    def __init__(self, dim: int, packed: bool, tail_energy: float | None = None) -> None:
        self.store = CodeStore(dim, packed)
        self.frame: Frame | None = None
        self._tail_energy = tail_energy

    def append(self, rows: AnyFloatArray) -> None:
        """Add the codes of rows; the first ones decide on the centre."""
        if not len(rows):
            return
        if self.frame is None:
            self._use(Frame.of(rows, tail_energy=self._tail_energy))
        assert self.frame is not None
        # Rows that torch's scan takes together have one scale, most often: it is fastest then.
        together = 1 if self.store.packed else GROUP
        for start, coded in self.frame.code_rows(rows, together, self.store.size % together):
            self.store.reserve(len(rows) - start)
            self.store.append(coded)

    def _use(self, frame: Frame) -> None:
        self.frame = frame
        self.store.split(frame.head, frame.back)

    def arrays(self, kept: npt.NDArray[np.bool_]) -> dict[str, Stream]:
        """Codes and frame as a file holds them, of the positions of a mask (N,)."""
        if self.frame is None:
            return {}
        frame: dict[str, Array] = {
            "centre": self.frame.centre.astype(np.float32),
            "head": np.array([self.frame.head, self.frame.back]),
            "order": self.frame.order,
            **{f"rotation.{i:03d}": block for i, block in enumerate(self.frame.blocks)},
        }
        made = {name: whole(array) for name, array in frame.items()}
        shape = (int(kept.sum()), len(self.frame.order))
        made["codes"] = Stream(np.dtype(np.int8), shape, self._codes(kept))
        for name in CodedRows._fields[1:]:
            column = [getattr(shard, name)[: shard.used] for shard in self.store.shards]
            made[name] = whole(np.concatenate([np.empty(0, np.float32), *column])[kept])
        return made

    def _codes(self, kept: npt.NDArray[np.bool_]) -> Iterator[Codes]:
        for start in range(0, len(kept), WRITE_ROWS):
            here = kept[start : start + WRITE_ROWS]
            codes = self.store.rows(start, start + len(here)).codes
            yield codes if here.all() else codes[here]

    def take(self, arrays: Mapping[str, Array]) -> bool:
        """Take over what `arrays` gave; False where there is nothing that this scan can use."""
        if not {"centre", *CodedRows._fields} <= set(arrays):
            return False
        blocks = [np.array(arrays[name]) for name in sorted(arrays) if name.startswith("rotation.")]
        centre, order, head = (np.array(arrays[name]) for name in ("centre", "order", "head"))
        if int(head[0]) < len(order) and not self.store.packed:
            return False  # only the C scan can do with a tail
        self._use(Frame.of_parts(centre, order, blocks, *head.tolist()))
        rows = CodedRows(*(arrays[name] for name in CodedRows._fields))
        for start in range(0, len(rows.scale), WRITE_ROWS):
            self.store.reserve(len(rows.scale) - start)
            self.store.append(rows.part(start, start + WRITE_ROWS))
        return True

    def queries(
        self, queries: Float64Array, rotate: Callable[[Float64Array, Frame], Float64Array]
    ) -> native.CodedQueries:
        """Queries (Q, dim), none of them zero, with their codes.

        `rotate` is what `Frame.rotate` does, in the threads that the scan uses, if it uses any.
        """
        assert self.frame is not None
        norm = divisors(queries)
        unit = queries / norm[:, None]
        coded = self.frame.code_rotated(rotate(unit, self.frame))
        padded = np.zeros((len(unit), self.store.width), np.int8)
        padded[:, : coded.codes.shape[1]] = coded.codes
        centre = np.einsum("qd,d->q", unit, self.frame.centre)
        coded = coded._replace(codes=padded)
        return native.CodedQueries(queries, norm, centre, coded, self.store.parts)


class CodedScan:
    """What the scans by codes keep beside the rows: their codes."""

    def __init__(self, rows: Rows, packed: bool, tail_energy: float | None = None) -> None:
        self._rows = rows
        self.coded = Coded(rows.dim, packed, tail_energy)

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
