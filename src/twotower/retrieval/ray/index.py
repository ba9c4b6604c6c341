"""Any exact or FAISS index in shards on the nodes of a Ray cluster (docs/scale.md).

A query goes to one replica of every shard; each answers with its k best rows and its state, which
must be that of the whole index. So a lost node costs time or a refusal, never a row.
"""

from __future__ import annotations

import json
import logging
import secrets
import shutil
import tempfile
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from twotower.checkpoint.atomic import link_or_copy, replacing
from twotower.config import IndexConfig
from twotower.retrieval.arrays import map_arrays, whole, write_arrays
from twotower.retrieval.engine import in_this_process
from twotower.retrieval.index import (
    INDEXES,
    NO_ID,
    AnyFloatArray,
    IdArray,
    SearchResult,
    check_query,
    check_rows,
    no_hits,
)
from twotower.retrieval.journal import (
    START,
    Journal,
    Operation,
    Plain,
    file_place,
)
from twotower.retrieval.ray.cluster import Shards, Unavailable
from twotower.retrieval.ray.shard import TOKEN, Wanted
from twotower.retrieval.row_ids import RowIds
from twotower.settings import ConfigError

log = logging.getLogger(__name__)

ShardArray = npt.NDArray[np.int16]


SHARDS = "shards"  # what a saved index says of the files that hold its rows


class RayIndex:
    """The shards of an index as actors, and the ids that say which shard a row is in."""

    def __init__(self, config: IndexConfig, dim: int) -> None:
        self.config = config
        self.dim = dim
        self._local = INDEXES.build(in_this_process(config), dim)  # refuses what cannot be built
        self._loaded = False
        self._ids = RowIds()
        self._owners: list[ShardArray] = []
        self._spool = _new_spool(config)
        folders = [self._spool / f"shard-{number:04d}" for number in range(config.shards)]
        for folder in folders:
            folder.mkdir()
        self._journals = [Journal(folder) for folder in folders]
        self._wanted = [Wanted(0, START, 0)] * config.shards
        try:
            self._shards = Shards(config, dim, folders)
        except BaseException:
            shutil.rmtree(self._spool, ignore_errors=True)
            raise
        self._finalizer = weakref.finalize(self, _close, self._shards, self._spool)

    def __len__(self) -> int:
        return self._ids.alive

    @property
    def nbytes(self) -> int:
        """Bytes of the ids here, and of every copy of the shards."""
        shards = sum(self._shards.call("nbytes", self._each(), working=True))
        return int(self._ids.array.nbytes + self._owner.nbytes + shards * self.config.replicas)

    @property
    def train_rows(self) -> int:
        """What a local index wants; it learns for all shards."""
        return 0 if self._loaded else self._local.train_rows

    def train(self, rows: AnyFloatArray, *, normalized: bool = False) -> None:
        """Learn here and hand what was learnt to all shards; see `VectorIndex.train`."""
        if not self.train_rows:
            return
        self._local.train(rows, normalized=normalized)
        learnt = self._spool / "learnt.bin"
        self._local.write(learnt)
        place = {"file": file_place(learnt)}
        self._do({number: ("read", 0, place, False) for number in range(len(self._journals))})

    def add(
        self, rows: AnyFloatArray, ids: IdArray | None = None, *, normalized: bool = False
    ) -> None:
        """Add rows (N, dim), so many to each shard that all are alike; see `VectorIndex.add`."""
        check_rows(rows, self.dim)
        if not len(rows):
            return
        if self.train_rows:
            self.train(rows[: self.train_rows], normalized=normalized)
        new = self._ids.offer(len(rows), ids)
        owners, work, start = [], {}, 0
        for number, count in enumerate(self._shares(len(rows))):
            if not count:
                continue
            part = slice(start, start + count)
            start += count
            journal, wanted = self._journals[number], self._wanted[number]
            named = {
                "rows": journal.place(wanted.operations, "rows", rows[part]),
                "ids": journal.place(wanted.operations, "ids", new[part]),
            }
            work[number] = ("add", wanted.rows + count, named, normalized)
            owners.append(np.full(count, number, np.int16))
        self._do(work)
        self._ids.extend(len(new), new)
        self._owners += owners

    def _shares(self, count: int) -> list[int]:
        """How many of `count` rows each shard takes, the emptier ones more."""
        sizes = [wanted.rows for wanted in self._wanted]
        shares = [0] * len(sizes)
        level = -(-(sum(sizes) + count) // len(sizes))
        for number, size in enumerate(sizes):
            shares[number] = max(0, min(count, level - size))
            count -= shares[number]
        return shares

    def delete(self, ids: IdArray) -> None:
        """Delete rows by their ids; see `VectorIndex.delete`."""
        ids = np.array(ids, np.int64).reshape(-1)
        owner = self._owner[self._ids.check(ids)]
        work = {}
        for number in np.unique(owner).tolist():
            journal, wanted = self._journals[number], self._wanted[number]
            mine = ids[owner == number]
            named = {"ids": journal.place(wanted.operations, "ids", mine)}
            work[number] = ("delete", wanted.rows - len(mine), named, False)
        self._do(work)
        self._ids.delete(ids)

    def search(self, queries: AnyFloatArray, k: int) -> SearchResult:
        """The k best rows of each query (Q, dim); see `VectorIndex.search`.

        Raises:
            Unavailable: also if a shard could not be reached within `index.patience`.
        """
        check_query(queries, self.dim, k)
        if not len(self) or not len(queries):
            return no_hits(len(queries), k)
        arguments = [
            (wanted, np.ascontiguousarray(queries), max(1, min(k, wanted.rows)))
            for wanted in self._wanted
        ]
        answers = self._shards.call("search", arguments, working=False)
        for wanted, answer in zip(self._wanted, answers, strict=True):
            if (answer.fingerprint, answer.rows) != (wanted.fingerprint, wanted.rows):
                raise Unavailable("a shard answered in another state than is searched; ask again")
        scores = np.concatenate([answer.scores for answer in answers], axis=1)
        found = np.concatenate([answer.ids for answer in answers], axis=1)
        order = np.lexsort((found, found == NO_ID, -scores))[:, :k]
        result = no_hits(len(queries), k)
        result.scores[:, : order.shape[1]] = np.take_along_axis(scores, order, 1)
        result.ids[:, : order.shape[1]] = np.take_along_axis(found, order, 1)
        return result

    def write(self, file: Path) -> None:
        """Write ids and the names of the shards' files, which lie beside it: `<name>-0000.bin`.

        From these, too, a lost shard is loaded from now on.
        """
        names = []
        for number, wanted in enumerate(self._wanted):
            names.append(self._journals[number].folder / f"{wanted.operations:06d}.index")
        arguments = [(wanted, name) for wanted, name in zip(self._wanted, names, strict=True)]
        self._shards.call("write", arguments, working=True)
        parts, work = [], {}
        stem = file.name.lstrip(".").partition(".")[0]  # of the name that `file` will have
        for number, name in enumerate(names):
            parts.append(f"{stem}-{number:04d}.bin")
            with replacing(file.parent / parts[-1]) as temporary:
                link_or_copy(name, temporary)
            place = {"file": file_place(name)}
            work[number] = ("read", self._wanted[number].rows, place, False)
        alive = self._ids.array >= 0
        about = {"parts": parts, "rows": [wanted.rows for wanted in self._wanted]}
        arrays = {"ids": self._ids.array[alive], "owner": self._owner[alive].astype(np.int64)}
        streams = {name: whole(array) for name, array in arrays.items()}
        write_arrays(file, streams, {SHARDS: json.dumps(about)})
        self._do(work)

    def read(self, file: Path) -> None:
        """Take over what `write` wrote.

        Raises:
            ConfigError: it has another number of shards.
        """
        arrays, texts = map_arrays(file)
        about = json.loads(texts[SHARDS])
        if len(about["parts"]) != self.config.shards:
            raise ConfigError(
                f"{file} holds {len(about['parts'])} shards, not index.shards="
                f"{self.config.shards}; build it again"
            )
        work = {}
        for number, (part, rows) in enumerate(zip(about["parts"], about["rows"], strict=True)):
            name = self._journals[number].folder / "000000.index"
            link_or_copy(file.parent / part, name)
            work[number] = ("read", rows, {"file": file_place(name)}, False)
        self._do(work)
        self._loaded = True
        self._ids.extend(len(arrays["ids"]), np.array(arrays["ids"]))
        self._owners = [np.array(arrays["owner"], np.int16)]

    def close(self) -> None:
        """End the actors; the index cannot be used any more."""
        self._finalizer()

    @property
    def _owner(self) -> ShardArray:
        """The shard of each id, in the order of adding."""
        if len(self._owners) != 1:
            self._owners = [np.concatenate([np.empty(0, np.int16), *self._owners])]
        return self._owners[0]

    def _each(self) -> list[tuple[Wanted]]:
        return [(wanted,) for wanted in self._wanted]

    def _do(self, work: dict[int, tuple[str, int, dict[str, Plain], bool]]) -> None:
        """Write an operation into the journals of some shards, and see it done by each of them.

        If one of them refuses, all is as it was.
        """
        before = list(self._wanted)
        try:
            for number, (kind, rows, named, normalized) in work.items():
                wanted = before[number]
                operation = Operation(kind, wanted.fingerprint, rows, named, normalized)
                self._journals[number].write(wanted.operations, operation)
                self._wanted[number] = Wanted(wanted.operations + 1, operation.after, rows)
            self._shards.call("sync", self._each(), working=True)
        except BaseException:
            self._wanted = before
            for number in work:
                self._journals[number].drop(before[number].operations)
            raise
        if self.config.replicas > 1:
            self._shards.tell("sync", self._each())


def _new_spool(config: IndexConfig) -> Path:
    """A new folder of this index alone."""
    try:
        if config.spool:
            folder = Path(config.spool).absolute() / f"index-{secrets.token_hex(8)}"
            folder.mkdir(parents=True)
        else:
            folder = Path(tempfile.mkdtemp(prefix="twotower-"))
        (folder / TOKEN).touch()
    except OSError as error:
        raise ConfigError(f"index.spool={config.spool} cannot be written: {error}") from error
    return folder


def _close(shards: Any, spool: Path) -> None:
    shutil.rmtree(spool, ignore_errors=True)  # first: a cluster that is gone answers late
    shards.close()
