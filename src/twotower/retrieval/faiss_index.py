"""Any FAISS index, named by its factory string."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from twotower.config import IndexConfig
from twotower.retrieval.index import (
    INDEXES,
    NO_ID,
    AnyFloatArray,
    IdArray,
    RowIds,
    SearchResult,
    as_searched,
    check_query,
    check_rows,
    no_hits,
)
from twotower.settings import ConfigError, setting


@dataclass(kw_only=True)
class FaissConfig(IndexConfig):
    """An index of FAISS; cosine is its inner product on rows of unit norm."""

    factory: str = setting("Flat", 'FAISS factory string; quote one with a comma: "IVF64,Flat"')
    nprobe: int = setting(0, "IVF cells visited a query; 0 is what FAISS does by itself", ge=0)
    ef_search: int = setting(0, "HNSW candidates a query; 0 is what FAISS does by itself", ge=0)
    sample_rows: int = setting(262_144, "rows drawn by seed to train on, at most", ge=1)


def import_faiss() -> ModuleType:
    """FAISS.

    Raises:
        ConfigError: it is not installed.
    """
    try:
        import faiss
    except ImportError as error:
        raise ConfigError(
            "index=faiss needs FAISS, which is not installed; run: pip install 'twotower[cpu]'"
        ) from error
    return faiss


def _reason(error: Exception) -> str:
    """What a FAISS exception says, without its C++ signature and source line."""
    last = str(error).strip().splitlines()[-1]
    text = re.sub(r"^Error in .*? at \S+\.(?:cpp|h|cu):\d+: ", "", last)
    return re.sub(r"^Error: '.*?' failed(?:: )?", "", text) or text


class FaissIndex:
    """A FAISS index with our ids, our padding and our sentences."""

    def __init__(self, config: FaissConfig, dim: int) -> None:
        self.config = config
        self.dim = dim
        self._faiss = import_faiss()
        self._ids = RowIds()
        with self._sentence("cannot be built"):
            made = self._faiss.index_factory(dim, config.factory, self._faiss.METRIC_INNER_PRODUCT)
        if not isinstance(made, self._faiss.IndexIDMap | self._faiss.IndexIVF):
            made = self._faiss.IndexIDMap(made)  # the others know no ids but 0, 1, 2, ...
        self._use(made)

    def _use(self, index: Any) -> None:
        self._index = index
        for name, value in (("nprobe", self.config.nprobe), ("efSearch", self.config.ef_search)):
            if value:
                with self._sentence(f"has no {name} to set"):
                    self._faiss.ParameterSpace().set_index_parameter(index, name, value)

    @contextmanager
    def _sentence(self, what: str) -> Iterator[None]:
        """Turn what FAISS throws into one sentence."""
        try:
            yield
        except (RuntimeError, AssertionError) as error:
            factory = self.config.factory
            points = re.search(r"training points \((\d+)\).*clusters \((\d+)\)", str(error))
            if points:
                raise ConfigError(
                    f"index.factory {factory!r} needs at least {points[2]} rows to train on, but "
                    f"there are {points[1]}; choose a smaller number, or Flat"
                ) from error
            raise ConfigError(
                f"index.factory {factory!r} {what} for dimension {self.dim}: {_reason(error)}"
            ) from error

    def __len__(self) -> int:
        return int(self._index.ntotal)

    @property
    def nbytes(self) -> int:
        """Bytes that FAISS would write, which is what it holds."""
        count = 0

        def add(data: bytes) -> int:
            nonlocal count
            count += len(data)
            return len(data)

        self._faiss.write_index(self._index, self._faiss.PyCallbackIOWriter(add))
        return count

    @property
    def train_rows(self) -> int:
        """`sample_rows` while the index is untrained."""
        return 0 if self._index.is_trained else self.config.sample_rows

    def train(self, rows: AnyFloatArray, *, normalized: bool = False) -> None:
        """Train on a sample (N, dim); see `VectorIndex.train`."""
        if self._index.is_trained:
            return
        check_rows(rows, self.dim)
        with self._sentence("cannot be trained"):
            self._index.train(as_searched(rows, self.config.metric, normalized))

    def add(
        self, rows: AnyFloatArray, ids: IdArray | None = None, *, normalized: bool = False
    ) -> None:
        """Add rows (N, dim); see `VectorIndex.add`. An untrained index trains on the first rows."""
        check_rows(rows, self.dim)
        if not len(rows):
            return
        self.train(rows[: self.config.sample_rows], normalized=normalized)
        new = self._ids.extend(len(rows), ids)
        with self._sentence("cannot take more rows"):
            self._index.add_with_ids(as_searched(rows, self.config.metric, normalized), new)

    def delete(self, ids: IdArray) -> None:
        """Delete rows by their ids; see `VectorIndex.delete`."""
        ids = np.array(ids, np.int64).reshape(-1)
        self._ids.check(ids)
        with self._sentence("cannot delete"):
            self._index.remove_ids(ids)
        self._ids.delete(ids)

    def search(self, queries: AnyFloatArray, k: int) -> SearchResult:
        """The k best rows of each query (Q, dim); see `VectorIndex.search`."""
        check_query(queries, self.dim, k)
        result = no_hits(len(queries), k)
        if not len(self) or not len(queries):
            return result
        with self._sentence("cannot be searched"):
            scores, ids = self._index.search(
                as_searched(queries, self.config.metric, normalized=False), min(k, len(self))
            )
        scores = np.where(ids == NO_ID, -np.inf, scores).astype(np.float32)
        order = np.lexsort((ids, -scores))  # (Q, k): by score, then by id
        result.scores[:, : ids.shape[1]] = np.take_along_axis(scores, order, 1)
        result.ids[:, : ids.shape[1]] = np.take_along_axis(ids, order, 1)
        return result

    def write(self, file: Path) -> None:
        """Write FAISS's own file, which holds the ids too."""
        with self._sentence("cannot be written"):  # a full disk is a RuntimeError of FAISS
            self._faiss.write_index(self._index, str(file))

    def read(self, file: Path) -> None:
        """Take over a file that `write` wrote."""
        self._use(self._faiss.read_index(str(file)))
        ids = self._stored_ids()
        self._ids.extend(len(ids), ids)

    def _stored_ids(self) -> IdArray:
        """The ids that the FAISS index holds, in any order."""
        if isinstance(self._index, self._faiss.IndexIDMap):
            known: IdArray = self._faiss.vector_to_array(self._index.id_map)
            return known
        lists = self._index.invlists
        parts = [
            self._faiss.rev_swig_ptr(lists.get_ids(cell), lists.list_size(cell)).copy()
            for cell in range(lists.nlist)
            if lists.list_size(cell)
        ]
        return np.concatenate([np.empty(0, np.int64), *parts])


@INDEXES.register("faiss", FaissConfig)
def build_faiss(config: FaissConfig, dim: int) -> FaissIndex:
    """An empty FAISS index.

    Raises:
        ConfigError: FAISS is not installed, or cannot make the factory string's index.
    """
    return FaissIndex(config, dim)
