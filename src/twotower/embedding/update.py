"""`encode.update=true`: what has changed is encoded and appended, what has vanished is marked."""

from __future__ import annotations

import dataclasses
import logging
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from twotower.checkpoint.atomic import replacing
from twotower.data.pairs import PairTable
from twotower.distributed import is_launched_main
from twotower.embedding.changes import Changes, find_changes
from twotower.embedding.claims import Claims
from twotower.embedding.fingerprint import differences
from twotower.embedding.folders import beside, clear
from twotower.embedding.layout import (
    DELETED,
    ERROR_SCHEMA,
    ERRORS,
    IMAGES,
    METADATA,
    STATE_SCHEMA,
    TEXTS,
    IntArray,
    Manifest,
    Shard,
)
from twotower.embedding.rows import RowGrid, fingerprint, id_ranges, with_ids
from twotower.embedding.store import EmbeddingStore
from twotower.embedding.work import ExportJob, ExportResult, run_export
from twotower.embedding.writer import ROWS_PER_GROUP, described_file
from twotower.encode_config import Rows
from twotower.launch import launch
from twotower.settings import ConfigError

log = logging.getLogger(__name__)


def update(job: ExportJob) -> ExportResult | None:
    """Bring a finished store to what its source is now; ids of rows that stay do not change.

    New and changed images are encoded in `<store>.update`, by any number of processes, and appended
    as further shards; until the manifest is replaced, at the end, readers see the old store. An
    update that finds other changes waits until this one is done, and looks again.

    Raises:
        ConfigError: the store cannot be updated, or was made in another way, or as `export`.
    """
    while True:
        there = _updatable(job.output, job.plan)
        changes = find_changes(
            job.pairs,
            job.encode.rows,
            _read_states(job.output / there.state),
            there.next_row_id,
            files=job.plan.images,
        )
        log.info("%s: %s images", job.output, changes.words())
        unchanged = job.plan.source_fingerprint == there.source_fingerprint
        if unchanged and not len(changes.rows):
            return ExportResult(folder=job.output, manifest=there, reused=True)
        part = _part(job, there, changes)
        if not is_launched_main():  # the first rank speaks for all
            return launch(run_export, job.distributed, part) if len(changes.rows) else None
        mark = job.plan.job("update", str(there.updates), part.plan.source_fingerprint)
        with Claims(job.output) as claims, claims.working(mark):
            if Manifest.read(job.output) == there:  # else look again
                return _update_now(job, part, there, changes, claims)


def _update_now(
    job: ExportJob, part: ExportJob, there: Manifest, changes: Changes, claims: Claims
) -> ExportResult | None:
    seconds = 0.0
    if len(changes.rows):
        result = launch(run_export, job.distributed, part)
        if result is None or not result.manifest.complete:
            return result
        seconds = result.seconds
    with claims.holding("append"):
        now = Manifest.read(job.output)
        if now == there:  # else another process has just done the same
            now = _append(there, job, part.folder, changes)
        clear(part.folder)
        claims.clear()
    return ExportResult(
        folder=job.output,
        manifest=now,
        encoded=len(changes.rows),
        seconds=seconds,
        update=changes.words(),
    )


def _read_states(path: Path) -> pa.Table:
    try:
        return pq.read_table(path, schema=STATE_SCHEMA)
    except (OSError, pa.ArrowException) as error:
        raise ConfigError(
            f"{path} cannot be read, so nobody knows what has changed; encode anew with "
            "encode.overwrite=true"
        ) from error


def _updatable(output: Path, plan: Manifest) -> Manifest:
    """The manifest of a store that can be updated by a plan.

    Raises:
        ConfigError: it cannot.
    """
    there = Manifest.read(output)
    anew = "encode anew with encode.overwrite=true"
    if not there.state:
        raise ConfigError(
            f"the store {output} cannot be updated: it does not say what its pictures were, since "
            "it was merged or is an older version's; update the stores that were merged and merge "
            f"them again, or {anew}"
        )
    if not (there.is_whole(output) and (output / there.state).exists()):
        raise ConfigError(f"the store {output} cannot be updated: it lacks files; {anew}")
    alike = dataclasses.replace(
        plan, source=there.source, source_fingerprint=there.source_fingerprint
    )
    if different := differences(there, alike):
        raise ConfigError(
            f"{output} holds another encoding, which cannot be updated: {'; '.join(different)}; "
            "choose another folder with encode.output=..., or replace it with encode.overwrite=true"
        )
    return there


def _part(job: ExportJob, there: Manifest, changes: Changes) -> ExportJob:
    """The job that makes a store of what is new or changed, exactly as the store was made."""
    pairs = job.pairs.take(changes.rows)
    as_there = (
        *("dim", "text_length", "model", "config", "preprocessing", "tokenizer"),
        *("batch_size", "threads"),
    )
    plan = dataclasses.replace(
        job.plan,
        source_rows=len(pairs),
        source_fingerprint=fingerprint(pairs),
        **{name: getattr(there, name) for name in as_there},
    )
    folder = beside(job.output, "update")
    return dataclasses.replace(job, pairs=pairs, output=folder, folder=folder, plan=plan, part=True)


def _append(there: Manifest, job: ExportJob, part: Path, changes: Changes) -> Manifest:
    """Put an encoded part into a store: shards, tombstones, states, errors; the manifest last."""
    output, pairs = job.output, job.pairs
    shards, states = list(there.shards), STATE_SCHEMA.empty_table()
    if len(changes.rows):
        encoded = Manifest.read(part)
        states = pq.read_table(part / encoded.state)
        first_ids = RowGrid(pairs.take(changes.rows), Rows[there.rows_kind]).first_ids
        for shard in encoded.shards:
            if shard.rows:
                number = shards[-1].shard + 1 if shards else 0
                shards.append(_append_shard(there, shard, number, part, output, changes, first_ids))
    store = EmbeddingStore(output, there)
    changes, gone = _without_unreadable(changes, states, store.row_ids())
    whole = changes.states(states)
    readable = pc.equal(whole["reason"], "")
    deleted = np.concatenate([store.deleted(), changes.deleted, gone])
    number = there.updates + 1
    manifest = dataclasses.replace(
        there,
        rows=pc.sum(whole.filter(readable)["rows"]).as_py() or 0,
        source_rows=len(pairs),
        errors=len(pairs) - (pc.sum(readable).as_py() or 0),
        source=job.plan.source,
        source_fingerprint=job.plan.source_fingerprint,
        state=f"source_{number}.parquet",
        next_row_id=changes.next_row_id,
        updates=number,
        deleted=len(deleted),
        shards=tuple(shards),
    )
    if not manifest.rows:
        raise ConfigError(f"nothing of {pairs.name} can be read; the store {output} stays as it is")
    with replacing(output / manifest.state) as temporary:
        pq.write_table(whole, temporary)
    with replacing(output / DELETED) as temporary, temporary.open("wb") as file:
        np.save(file, deleted)
    _write_errors(output, pairs, whole)
    manifest.write(output)
    (output / there.state).unlink(missing_ok=True)
    return manifest


def _append_shard(
    there: Manifest,
    shard: Shard,
    number: int,
    part: Path,
    output: Path,
    changes: Changes,
    first_ids: IntArray,
) -> Shard:
    """Copy a shard of the part into the store under its new number, with the store's own ids."""
    files: dict[str, dict[str, int | str]] = {}
    for kind in (IMAGES, TEXTS):
        if getattr(there, {IMAGES: "images", TEXTS: "texts"}[kind]):
            name = there.path(kind, number)
            with replacing(output / name) as temporary:
                shutil.copyfile(part / shard.file(kind), temporary)
            files[name] = described_file(output / name)
    metadata = pq.read_table(part / shard.file(METADATA))
    places = metadata["source_row"].to_numpy()
    rows = changes.rows[places]
    ids = changes.first_ids[rows] + metadata["row_id"].to_numpy() - first_ids[places]
    name = there.path(METADATA, number)
    with replacing(output / name) as temporary:
        pq.write_table(with_ids(metadata, ids, rows), temporary, row_group_size=ROWS_PER_GROUP)
    files[name] = described_file(output / name)
    return dataclasses.replace(shard, shard=number, files=files)


def _without_unreadable(
    changes: Changes, encoded: pa.Table, alive: IntArray
) -> tuple[Changes, IntArray]:
    """Ids of rows whose picture cannot be read any more; should it be mended, it gets new ones.

    Returns:
        The changes with those new ids, and the old ones.
    """
    unreadable = changes.rows[pc.not_equal(encoded["reason"], "").to_numpy()]
    gone = unreadable[np.isin(changes.first_ids[unreadable], alive)]
    counts, first_ids = changes.counts[gone], changes.first_ids.copy()
    first_ids[gone] = changes.next_row_id + np.cumsum(counts) - counts
    next_row_id = changes.next_row_id + int(counts.sum())
    renumbered = dataclasses.replace(changes, first_ids=first_ids, next_row_id=next_row_id)
    return renumbered, id_ranges(changes.first_ids[gone], counts)


def _write_errors(output: Path, pairs: PairTable, states: pa.Table) -> None:
    unreadable = states.filter(pc.not_equal(states["reason"], ""))["reason"].to_pylist()
    rows = np.flatnonzero(pc.not_equal(states["reason"], "").to_numpy()).tolist()
    errors = [
        {"source_row": row, "path": str(pairs.path(row)), "reason": reason}
        for row, reason in zip(rows, unreadable, strict=True)
    ]
    with replacing(output / ERRORS) as temporary:
        pq.write_table(pa.Table.from_pylist(errors, ERROR_SCHEMA), temporary)
