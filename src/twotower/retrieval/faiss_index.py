"""Any FAISS index, named by its factory string."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, ClassVar

import numpy as np

from twotower.config import IndexConfig
from twotower.retrieval.faiss_parts import (
    check_gpu,
    check_mapping,
    keeps_ids,
    prepare_training,
    read_index,
    searched_with,
    stored_ids,
    to_gpu,
    without_ids,
)
from twotower.retrieval.index import (
    INDEXES,
    NO_ID,
    AnyFloatArray,
    IdArray,
    SearchResult,
    VectorIndex,
    as_searched,
    check_query,
    check_rows,
    no_hits,
)
from twotower.retrieval.rerank import RerankedIndex
from twotower.retrieval.row_ids import RowIds
from twotower.settings import ConfigError, setting


@dataclass(kw_only=True)
class FaissConfig(IndexConfig):
    """An index of FAISS; cosine is its inner product on rows of unit norm."""

    factory: str = setting("Flat", 'FAISS factory string; quote one with a comma: "IVF64,Flat"')
    sample_rows: int = setting(262_144, "rows drawn by seed to train on, at most", ge=1)
    nprobe: int = setting(0, "IVF cells visited a query; 0 is what FAISS does by itself", ge=0)
    ef_search: int = setting(0, "HNSW candidates a query; 0 is what FAISS does by itself", ge=0)
    k_factor: float = setting(
        0.0,
        "candidates that `,RFlat` or `,Refine(...)` looks at again, as a multiple of k; 0 is what "
        "FAISS does by itself",
        ge=0,
    )
    rerank: float = setting(
        0.0,
        "candidates that are scored again, exactly, by the mapped rows of the store, as a multiple "
        "of k; 0 is none; serves any factory string, but not engine=ray",
        ge=0,
    )
    memory_map: bool = setting(False, "map a saved index instead of reading it into memory")
    gpu: bool = setting(False, "search on the first GPU; needs FAISS for GPUs")

    # How it is searched; the same built index serves all of these.
    of_the_search: ClassVar[tuple[str, ...]] = (
        *("nprobe", "ef_search", "k_factor", "rerank", "memory_map", "gpu"),
    )
    not_of_the_rows: ClassVar[tuple[str, ...]] = (*IndexConfig.not_of_the_rows, *of_the_search)

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("k_factor", "rerank"):
            if 0 < getattr(self, name) < 1:
                raise ConfigError(
                    f"index.{name} must be 0 or at least 1, not {getattr(self, name)}: of fewer "
                    "than k candidates there are no k results"
                )

    def searched_as(self, asked: FaissConfig) -> FaissConfig:
        """These settings, with those of a search wherever another config gives them."""
        given = {name: getattr(asked, name) for name in self.of_the_search if getattr(asked, name)}
        return dataclasses.replace(self, **given)


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
        self._by_itself = searched_with(made)  # a file has the values that it was written with
        self._use(made if keeps_ids(made) else self._faiss.IndexIDMap(made))
        if config.gpu:
            check_gpu()
        if config.memory_map:
            check_mapping(self._index)

    def search_with(self, **settings: float) -> None:
        """Change settings of the search: `nprobe`, `ef_search`, `k_factor`."""
        self.config = dataclasses.replace(self.config, **settings)  # type: ignore[arg-type]
        self._apply()

    def _use(self, index: Any) -> None:
        self._index = index
        self._mapped = False
        self._apply()

    def _apply(self) -> None:
        self._searched: Any = None  # the copy on a GPU, until rows or settings change
        settings = (
            ("nprobe", self.config.nprobe),
            ("efSearch", self.config.ef_search),
            ("k_factor_rf", self.config.k_factor),
        )
        for name, asked in settings:
            value = asked or self._by_itself.get(name)
            if value:
                with self._sentence(f"has no {name} to set"):
                    self._faiss.ParameterSpace().set_index_parameter(self._index, name, value)

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
        prepare_training(self._index, self.config.factory, len(rows))
        with self._sentence("cannot be trained"):
            self._index.train(as_searched(rows, self.config.metric, normalized))

    def add(
        self, rows: AnyFloatArray, ids: IdArray | None = None, *, normalized: bool = False
    ) -> None:
        """Add rows (N, dim); see `VectorIndex.add`. An untrained index trains on the first rows."""
        check_rows(rows, self.dim)
        if not len(rows):
            return
        self._change()
        self.train(rows[: self.config.sample_rows], normalized=normalized)
        new = self._ids.extend(len(rows), ids)
        with self._sentence("cannot take more rows"):
            self._index.add_with_ids(as_searched(rows, self.config.metric, normalized), new)

    def delete(self, ids: IdArray) -> None:
        """Delete rows by their ids; see `VectorIndex.delete`."""
        ids = np.array(ids, np.int64).reshape(-1)
        self._ids.check(ids)
        self._change()
        with self._sentence("cannot delete"):
            self._index.remove_ids(ids)
        self._ids.delete(ids)

    def _change(self) -> None:
        if self._mapped:
            raise ConfigError(
                "index.memory_map=true opens an index for searching only; leave it out to add or "
                "delete rows"
            )
        self._searched = None

    def search(self, queries: AnyFloatArray, k: int) -> SearchResult:
        """The k best rows of each query (Q, dim); see `VectorIndex.search`."""
        check_query(queries, self.dim, k)
        result = no_hits(len(queries), k)
        if not len(self) or not len(queries):
            return result
        if self._searched is None:
            self._searched = to_gpu(self._index) if self.config.gpu else self._index
        with self._sentence("cannot be searched"):
            scores, ids = self._searched.search(
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

    def write_bare(self, file: Path) -> None:
        """Write FAISS's own file without our ids, where FAISS keeps them beside the index."""
        with self._sentence("cannot be written"):
            self._faiss.write_index(without_ids(self._index)[0], str(file))

    @property
    def faiss_index(self) -> Any:
        """What FAISS has made."""
        return self._index

    def read(self, file: Path) -> None:
        """Take over a file that `write` wrote, which stays mapped with `memory_map`."""
        self._use(read_index(file, memory_map=self.config.memory_map))
        self._mapped = self.config.memory_map
        ids = np.concatenate([np.empty(0, np.int64), *stored_ids(self._index)])
        self._ids.extend(len(ids), ids)


@INDEXES.register("faiss", FaissConfig)
def build_faiss(config: FaissConfig, dim: int) -> VectorIndex:
    """An empty FAISS index, behind an exact second look if the config asks for it.

    Raises:
        ConfigError: FAISS is not installed, or cannot make the factory string's index.
    """
    index = FaissIndex(config, dim)
    return RerankedIndex(index) if config.rerank else index
