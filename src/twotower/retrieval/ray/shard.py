"""One shard of an index, as an actor of a Ray cluster holds it: rebuilt from its journal alone."""

from __future__ import annotations

import logging
import platform
from pathlib import Path
from typing import NamedTuple

import numpy as np

from twotower.config import IndexConfig
from twotower.retrieval.index import (
    INDEXES,
    AnyFloatArray,
    FloatArray,
    IdArray,
    VectorIndex,
)
from twotower.retrieval.journal import START, Journal, Operation, unchanged
from twotower.settings import ConfigError

log = logging.getLogger(__name__)

TOKEN = "spool"  # a file that a node sees if it sees the folder


class Wanted(NamedTuple):
    """The state of a shard that is asked: after so many operations, with this fingerprint."""

    operations: int
    fingerprint: str
    rows: int


class Answer(NamedTuple):
    """What a shard found: its state, and the best rows (Q, k) of it."""

    fingerprint: str
    rows: int
    scores: FloatArray
    ids: IdArray


class Shard:
    """A part of an index. Whatever is asked, it first does what its journal has in addition.

    After a restart by Ray, on whichever node, it so becomes what it was.
    """

    def __init__(self, config: IndexConfig, dim: int, folder: Path) -> None:
        self._config = config
        self._dim = dim
        self._journal = Journal(folder)
        self._index: VectorIndex | None = None
        self._done = 0
        self._fingerprint = START
        self._load()

    def _load(self) -> None:
        """Do what there is to do; whoever asks next is told what went wrong."""
        try:
            self._catch_up(self._journal.count())
        except Exception as error:
            log.warning("the shard %s cannot be loaded: %s", self._journal.folder, error)

    def hello(self) -> None:
        """Say that the actor is there."""

    def sync(self, wanted: Wanted) -> tuple[str, int]:
        """Become what is wanted; returns fingerprint and rows.

        Raises:
            ConfigError: an operation cannot be done, or the journal is not what is wanted.
        """
        self._become(wanted)
        return self._fingerprint, self._rows

    def search(self, wanted: Wanted, queries: AnyFloatArray, k: int) -> Answer:
        """The best k rows of each query (Q, dim), padded if there are fewer.

        Raises:
            ConfigError: as `sync` and `VectorIndex.search` do.
        """
        index = self._become(wanted)
        found = index.search(queries, k)
        return Answer(self._fingerprint, len(index), *found)

    def nbytes(self, wanted: Wanted) -> int:
        """Bytes that the shard holds."""
        return self._become(wanted).nbytes

    def write(self, wanted: Wanted, file: Path) -> str:
        """Write the shard to a new file that the nodes share; returns its fingerprint."""
        self._become(wanted).write(file)
        return self._fingerprint

    @property
    def _rows(self) -> int:
        return len(self._index) if self._index is not None else 0

    def _become(self, wanted: Wanted) -> VectorIndex:
        if self._done > wanted.operations:
            self._index = None  # an operation was taken back
        self._catch_up(wanted.operations)
        if self._fingerprint != wanted.fingerprint:
            self._index = None  # one was taken back, and another one done
            self._catch_up(wanted.operations)
        assert self._index is not None
        if (self._fingerprint, self._rows) != (wanted.fingerprint, wanted.rows):
            raise ConfigError(
                f"a shard has {self._rows} rows and fingerprint {self._fingerprint[:8]} where "
                f"{wanted.rows} and {wanted.fingerprint[:8]} are wanted; build the index again"
            )
        return self._index

    def _catch_up(self, count: int) -> None:
        following = self._journal.operation(self._done) if self._done < count else None
        if following is not None and following.before != self._fingerprint:
            self._index = None  # what was done last was taken back, and another one done
        if self._index is None:
            self._index = INDEXES.build(self._config, self._dim)
            self._done, self._fingerprint = self._journal.first(count), START
        for number in range(self._done, count):
            operation = self._journal.operation(number)
            if operation is None:
                raise ConfigError(self._unseen(number))
            anew = operation.kind == "read" and self._fingerprint == START
            if operation.before != self._fingerprint and not anew:
                raise ConfigError(f"the journal {self._journal.folder} is damaged")
            try:
                self._do(operation)
            except BaseException:
                self._index = None  # it may be half done
                raise
            self._done, self._fingerprint = number + 1, operation.after

    def _do(self, operation: Operation) -> None:
        assert self._index is not None
        named = operation.named
        if operation.kind == "add":
            ids = np.asarray(self._journal.array(named["ids"]))
            rows = self._journal.array(named["rows"])
            self._index.add(rows, ids, normalized=operation.normalized)
        elif operation.kind == "delete":
            self._index.delete(np.asarray(self._journal.array(named["ids"])))
        elif self._fingerprint == START:
            self._index.read(unchanged(named["file"]))
        # Else the file is what this shard itself is already.
        if len(self._index) != operation.rows:
            raise ConfigError(
                f"a shard has {len(self._index)} rows where its journal has {operation.rows}"
            )

    def _unseen(self, number: int) -> str:
        folder = self._journal.folder
        if (folder.parent / TOKEN).exists():
            return f"operation {number} of the shard {folder} is lost; build the index again"
        return (
            f"the node {platform.node()} does not see the folder {folder.parent}; name one that "
            "all nodes share with index.spool=..."
        )
