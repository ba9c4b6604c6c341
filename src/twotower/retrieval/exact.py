"""Exact top-k by cosine or inner product: a scan leaves few rows, and their fp64 scores decide.

Three scans give the same answer, and the fastest that works here is taken (tiers.py): codes of
eight bits with bounds, in C or with torch, or fp32 scores with the bound of their rounding.
"""

from __future__ import annotations

import enum
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from twotower.config import IndexConfig, Metric
from twotower.retrieval.arrays import chosen, map_arrays, whole, write_arrays
from twotower.retrieval.index import (
    INDEXES,
    NO_ID,
    AnyFloatArray,
    Float64Array,
    IdArray,
    SearchResult,
    as_searched,
    check_query,
    check_rows,
    no_hits,
    norms_of,
)
from twotower.retrieval.row_files import RowFile
from twotower.retrieval.rows import KeptRows, Rows, as_stored
from twotower.retrieval.scan.candidates import rank_in_query, round_to_24_bits
from twotower.retrieval.scan.reference_scan import ReferenceScan
from twotower.retrieval.scan.tiers import Tier, make_scan
from twotower.settings import ConfigError, setting

FILES = "row_files"  # what a saved index says of rows that lie outside of it
NEXT = "next_id"  # and of the id that the next row gets


class RowMemory(enum.Enum):
    """How the rows are kept."""

    fp32 = "fp32"
    fp16 = "fp16"
    stored = "stored"


@dataclass(kw_only=True)
class ExactConfig(IndexConfig):
    """Exact search over all rows."""

    memory: RowMemory = setting(
        RowMemory.fp32,
        "fp32 or fp16: rows in memory, fp16 rounds them; stored: as the store has them, mapped",
    )
    tier: Tier = setting(
        Tier.auto, "native (C, int8), torch (int8) or reference (fp32); auto is the fastest here"
    )
    block_rows: int = setting(8192, "rows that the reference scores at a time", ge=1)


class ExactIndex:
    """Exact top-k by cosine or inner product; see the module for why it is exact."""

    train_rows = 0

    def __init__(self, config: ExactConfig, dim: int) -> None:
        self.config = config
        self.dim = dim
        self._rows = Rows(dim, config.metric)
        self._scan = make_scan(config.tier, self._rows)
        self._rows.at_random = self._scan is not None
        self._reference = ReferenceScan(self._rows, config.block_rows)

    def __len__(self) -> int:
        return len(self._rows)

    @property
    def nbytes(self) -> int:
        """Bytes of rows, norms, ids and codes."""
        return self._rows.nbytes + (self._scan.nbytes if self._scan else 0)

    def train(self, rows: AnyFloatArray, *, normalized: bool = False) -> None:
        """There is nothing to learn."""

    def add(
        self, rows: AnyFloatArray, ids: IdArray | None = None, *, normalized: bool = False
    ) -> None:
        """Add rows (N, dim); see `VectorIndex.add`.

        Raises:
            ConfigError: also if a norm is beyond 1e38, where fp32 scores would overflow.
        """
        check_rows(rows, self.dim)
        kept = self._kept(rows, normalized)
        self._rows.append(kept, ids)
        if self._scan:
            self._scan.append(kept)

    def _kept(self, rows: AnyFloatArray, normalized: bool) -> AnyFloatArray:
        if self.config.memory is RowMemory.stored:
            return as_stored(rows, self.config.metric, normalized)
        kept: AnyFloatArray = as_searched(rows, self.config.metric, normalized)
        if self.config.memory is RowMemory.fp16:
            with np.errstate(over="ignore"):
                kept = kept.astype(np.float16)
            return check_rows(kept, self.dim, "row, rounded to fp16,")
        # What is the caller's array still is copied: he may go on writing into it.
        return kept.copy() if np.may_share_memory(kept, rows) else kept

    def delete(self, ids: IdArray) -> None:
        """Delete rows by their ids; see `VectorIndex.delete`."""
        places = self._rows.ids.delete(ids)
        if self._scan:
            self._scan.delete(places)

    def search(self, queries: AnyFloatArray, k: int) -> SearchResult:
        """The k best rows of each query (Q, dim); see `VectorIndex.search`."""
        check_query(queries, self.dim, k)
        self._check_whole()
        result = no_hits(len(queries), k)
        k = min(k, len(self))
        if not k:
            return result
        # Where most rows are wanted there is nothing to prune.
        scan = self._scan if self._scan and 4 * k <= len(self) else self._reference
        zero = ~queries.any(axis=1)
        if zero.any():  # every row scores 0
            ids = self._rows.ids.array
            result.ids[zero, :k] = np.sort(np.partition(ids[ids >= 0], k - 1)[:k])
            result.scores[zero, :k] = 0
        others = np.nonzero(~zero)[0]
        step = scan.query_block(k)
        for start in range(0, len(others), step):
            chosen = others[start : start + step]
            found, scores = scan.search(queries[chosen].astype(np.float64), k)
            place = (chosen[found.query], rank_in_query(found.query))
            with np.errstate(over="ignore"):  # a score beyond fp32 is returned as infinity
                # Rounded as they were ranked first: below fp32's range its coarser steps would else
                # be decided by bits that the rank did not see.
                result.scores[place] = round_to_24_bits(scores)
            result.ids[place] = self._rows.ids.array[found.position]
        return result

    def _check_whole(self) -> None:
        """Refuse to go on with rows that have no codes.

        Raises:
            ConfigError: an `add` ended early, as by Ctrl-C.
        """
        if self._scan and self._scan.coded.store.size != self._rows.size:
            raise ConfigError("adding rows to this index was interrupted; build it again")

    def score(self, queries: AnyFloatArray, ids: IdArray) -> tuple[Float64Array, Float64Array]:
        """The exact scores (Q, k) of rows by their ids (Q, k), and by how much a tie may differ.

        Where the id is -1 the score is -inf. Two scores tie within 1e-6 * |query| * |row|.

        Raises:
            ConfigError: an id is not in the index, or the queries cannot be searched.
        """
        check_query(queries, self.dim, 1)
        there = ids != NO_ID
        position, query = self._rows.ids.places(ids[there]), np.nonzero(there)[0]
        if (position < 0).any():
            raise ConfigError("an id that is to be scored is not in the index")
        wide = queries.astype(np.float64)
        scores, ties = np.full(ids.shape, -np.inf), np.zeros(ids.shape)
        scores[there] = self._rows.scores(wide, query, position)
        scale = 1.0 if self.config.metric is Metric.cosine else norms_of(wide)[query]
        ties[there] = 1e-6 * scale * self._rows.norms()[position]
        return scores, ties

    def write(self, file: Path) -> None:
        """Write rows, norms, ids and codes to a safetensors file, a few at a time.

        Rows that are mapped from a store's file stay there, and this file names it; of such a file
        deleted rows keep their places. Elsewhere they are left out.
        """
        self._check_whole()
        ids = self._rows.ids.array
        kept = ids >= 0
        arrays, files = {}, {}
        for number, part in enumerate(self._rows.parts):
            name = f"rows.{number:06d}"
            here = slice(part.start, part.start + len(part.rows))
            if part.file:
                files[name] = part.file.to_plain(file.parent)
                kept[here] = True
            else:
                arrays[name] = chosen(part.rows, kept[here])
        arrays.update(ids=whole(ids[kept]), norms=whole(self._rows.norms()[kept]))
        if self._scan:
            arrays.update(self._scan.coded.arrays(kept))
        about = {FILES: json.dumps(files), NEXT: str(self._rows.ids.next)}
        write_arrays(file, arrays, about)

    def read(self, file: Path) -> None:
        """Take over what `write` wrote; rows stay in files where the config says `stored`.

        Raises:
            ConfigError: a store's file that holds rows has changed or is not there.
        """
        arrays, about = map_arrays(file)
        files = {
            name: RowFile.of_plain(plain, file.parent)
            for name, plain in json.loads(about[FILES]).items()
        }
        stored = self.config.memory is RowMemory.stored
        parts: list[KeptRows] = []
        for name in sorted({name for name in arrays if name.startswith("rows.")} | set(files)):
            if name in files:
                mapped = files[name].rows(at_random=self._rows.at_random)
                parts.append((mapped, files[name]))
            else:
                parts.append((arrays[name] if stored else np.array(arrays[name]), None))
        ids = np.array(arrays["ids"])
        self._rows.restore(parts, np.array(arrays["norms"]), ids, int(about[NEXT]))
        if not self._scan or self._scan.coded.take(arrays):
            return
        for part in self._rows.parts:  # another scan wrote the file, or one without codes
            self._scan.append(part.file.rows() if part.file else part.rows)
        self._scan.delete(np.flatnonzero(ids < 0))


@INDEXES.register("exact", ExactConfig)
def build_exact(config: ExactConfig, dim: int) -> ExactIndex:
    """An empty exact index.

    Raises:
        ConfigError: the tier that is asked for does not run here.
    """
    return ExactIndex(config, dim)
