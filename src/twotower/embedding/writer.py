"""Writing an embedding store shard by shard: a killed run leaves whole shards or nothing."""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from twotower.checkpoint.atomic import replacing
from twotower.checkpoint.native import file_sha256
from twotower.embedding.fingerprint import differences
from twotower.embedding.folders import clear
from twotower.embedding.layout import (
    DONE,
    ERROR_SCHEMA,
    ERRORS,
    IMAGES,
    MANIFEST,
    METADATA,
    SOURCE,
    STATE_SCHEMA,
    STATES,
    TEXTS,
    FloatRows,
    Manifest,
    Shard,
    write_json,
)
from twotower.settings import ConfigError

log = logging.getLogger(__name__)

# Small enough that the metadata of a few hits costs a few groups, large enough to compress.
ROWS_PER_GROUP = 4096


class InputError(NamedTuple):
    """An input that could not be read."""

    source_row: int
    path: str
    reason: str


class ShardRows(NamedTuple):
    """What a shard will hold: vectors (n, D), metadata, the images' states, unreadable inputs."""

    images: FloatRows | None
    texts: FloatRows | None
    metadata: pa.Table
    states: pa.Table
    errors: Sequence[InputError]


@dataclass(frozen=True)
class StoreWriter:
    """A store in the making: `folder` and the plan that every shard follows.

    A shard's record in `shards/` is written after its files, so a record stands for a whole shard;
    several processes write different shards at the same time. `finish` gathers the records in the
    manifest.
    """

    folder: Path
    plan: Manifest
    may_be_empty: bool = False

    @classmethod
    def begin(
        cls, folder: Path, plan: Manifest, *, anew: bool = False, may_be_empty: bool = False
    ) -> StoreWriter:
        """Write the plan; what was begun with the same one is continued with its number of threads.

        A finished store that lost a file gives its whole shards.

        Args:
            anew: another plan's files are removed, for the folder is that of a replacement.
            may_be_empty: it is no mistake if nothing at all can be read.

        Raises:
            ConfigError: the files of another plan are there.
        """
        there = Manifest.read(folder) if (folder / MANIFEST).exists() else None
        finished = there is not None and there.complete and there.is_whole(folder)
        different = differences(there, plan, device=anew or not finished) if there else []
        if different and not anew:
            raise ConfigError(
                f"{folder} holds another encoding: {'; '.join(different)}; choose another folder "
                "with encode.output=..., or replace it with encode.overwrite=true"
            )
        if different:
            clear(folder)
            there, finished = None, False
        plan = dataclasses.replace(plan, threads=there.threads) if there else plan
        writer = cls(folder, plan, may_be_empty)
        if finished:  # by another process in the meantime
            return writer
        if there and there.complete:
            writer._reopen(there)
        writer.plan.write(folder)
        return writer

    def is_over(self) -> bool:
        """Whether nothing is left to be written: it is finished, or removed or moved after that."""
        try:
            return Manifest.read(self.folder).complete
        except ConfigError:
            return True

    def _reopen(self, finished: Manifest) -> None:
        path = self.folder / ERRORS
        errors = pq.read_table(path) if path.exists() else ERROR_SCHEMA.empty_table()
        try:
            states = pq.ParquetFile(self.folder / SOURCE)
        except OSError:  # then every shard is made again
            return
        for shard in finished.shards:
            rows = self.plan.shard_range(shard.shard)
            inside = pc.and_(
                pc.greater_equal(errors["source_row"], rows.start),
                pc.less(errors["source_row"], rows.stop),
            )
            found = [InputError(**error) for error in errors.filter(inside).to_pylist()]
            if shard.is_whole(self.folder) and len(found) == shard.errors:
                self._write_states(shard.shard, states.read_row_group(shard.shard))
                self._write_record(shard, found)

    def missing(self) -> list[int]:
        """The shards that are not there, or not whole, in order."""
        if self.is_over():
            return []
        shards = range(self.plan.num_shards)
        return [shard for shard in shards if not self._is_done(shard)]

    def is_recorded(self, shard: int) -> bool:
        """Whether a shard's record is written; cheaper than to look at its files."""
        return self._record(shard).exists()

    def recorded(self) -> set[int]:
        """The shards that have a record, by one look at their folder."""
        try:
            names = os.listdir(self.folder / DONE)
        except OSError:
            return set()
        records = (name for name in names if name.endswith(".json") and name[0] != ".")
        return {int(Path(name).stem.rpartition("_")[2]) for name in records}

    def _record(self, shard: int) -> Path:
        return self.folder / self.plan.path(DONE, shard)

    def _is_done(self, shard: int) -> bool:
        if not self._record(shard).exists():
            return False
        whole = self._read_record(shard)[0].is_whole(self.folder)
        if whole and self._states(shard).exists():
            return True
        self._record(shard).unlink()
        return False

    def _read_record(self, shard: int) -> tuple[Shard, list[InputError]]:
        plain = json.loads(self._record(shard).read_text())
        return Shard(**plain["shard"]), [InputError(*error) for error in plain["errors"]]

    def _states(self, shard: int) -> Path:
        return self.folder / self.plan.path(STATES, shard)

    def _write_states(self, shard: int, states: pa.Table) -> None:
        with replacing(self._states(shard)) as temporary:
            pq.write_table(states, temporary)

    def _write_record(self, shard: Shard, errors: Sequence[InputError]) -> None:
        write_json(
            self._record(shard.shard), {"shard": dataclasses.asdict(shard), "errors": errors}
        )

    def commit(self, shard: int, rows: ShardRows) -> None:
        """Write a shard; its record comes last.

        Another process that was faster with the same shard has written the same; then, nothing is
        done.

        Raises:
            ConfigError: the disk is full or the folder is not writable; whole shards stay.
        """
        if self.is_recorded(shard) or self.is_over():
            return
        try:
            self._write(shard, rows)
        except ConfigError:
            if not self.is_recorded(shard) and not self.is_over():
                raise
        if self.is_over():  # it was finished just now, and needs no records
            for kind in (DONE, STATES):
                shutil.rmtree(self.folder / kind, ignore_errors=True)

    def _write(self, shard: int, rows: ShardRows) -> None:
        files: dict[str, dict[str, int | str]] = {}
        for kind, vectors in ((IMAGES, rows.images), (TEXTS, rows.texts)):
            if vectors is None:
                continue
            assert len(vectors) == rows.metadata.num_rows
            name = self.plan.path(kind, shard)
            with replacing(self.folder / name) as temporary, temporary.open("wb") as file:
                np.save(file, vectors)
            files[name] = described_file(self.folder / name)
        name = self.plan.path(METADATA, shard)
        with replacing(self.folder / name) as temporary:
            pq.write_table(rows.metadata, temporary, row_group_size=ROWS_PER_GROUP)
        files[name] = described_file(self.folder / name)
        self._write_states(shard, rows.states)
        source_rows = self.plan.shard_range(shard)
        record = Shard(
            shard=shard,
            first_source_row=source_rows.start,
            source_rows=len(source_rows),
            rows=rows.metadata.num_rows,
            errors=len(rows.errors),
            files=files,
        )
        self._write_record(record, rows.errors)

    def finish(self) -> Manifest:
        """Write the errors and, last, the finished manifest, which takes the records over.

        Raises:
            ConfigError: nothing at all could be read. The store is removed, so that a rerun reads
                again.
        """
        records = [self._read_record(shard) for shard in range(self.plan.num_shards)]
        errors = [error for _, found in records for error in found]
        shards = tuple(shard for shard, _ in records)
        rows = sum(shard.rows for shard in shards)
        if not rows and not self.may_be_empty:
            clear(self.folder)
            raise ConfigError(
                f"none of the {len(errors)} pictures of {self.plan.source} could be read; the "
                f"first is {errors[0].path}: {errors[0].reason}"
            )
        table = pa.Table.from_pylist([error._asdict() for error in errors], ERROR_SCHEMA)
        with replacing(self.folder / ERRORS) as temporary:
            pq.write_table(table, temporary)
        next_row_id = self._gather_states()
        manifest = dataclasses.replace(
            self.plan,
            complete=True,
            rows=rows,
            errors=len(errors),
            state=SOURCE,
            next_row_id=next_row_id,
            shards=shards,
        )
        manifest.write(self.folder)
        for kind in (DONE, STATES):
            shutil.rmtree(self.folder / kind, ignore_errors=True)
        for stale in self.folder.rglob(".*.tmp"):
            stale.unlink(missing_ok=True)
        return manifest

    def _gather_states(self) -> int:
        """One file of all images' states, a group a shard; the first id that no row has."""
        beyond = 0
        with (
            replacing(self.folder / SOURCE) as temporary,
            pq.ParquetWriter(temporary, STATE_SCHEMA) as file,
        ):
            for shard in range(self.plan.num_shards):
                states = pq.read_table(self._states(shard), schema=STATE_SCHEMA)
                file.write_table(states, row_group_size=max(1, len(states)))
                beyond = states["row_id"][-1].as_py() + states["rows"][-1].as_py()
        return int(beyond)


def described_file(path: Path) -> dict[str, int | str]:
    """The size in bytes and the SHA-256 of a file, as a shard's record has them."""
    return {"bytes": path.stat().st_size, "sha256": file_sha256(path)}
