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
from twotower.config import DistributedConfig
from twotower.data.pairs import PairTable
from twotower.embedding.changes import Changes, find_changes
from twotower.embedding.claims import Claims
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
from twotower.embedding.pictures import name_of_row
from twotower.embedding.rows import RowGrid, fingerprint, with_ids
from twotower.embedding.store import EmbeddingStore
from twotower.embedding.work import ExportJob, ExportResult, run_export
from twotower.embedding.writer import ROWS_PER_GROUP, described_file
from twotower.encode_config import EncodeConfig, Rows
from twotower.launch import launch
from twotower.settings import ConfigError

log = logging.getLogger(__name__)


def update(
    plan: Manifest,
    pairs: PairTable,
    output: Path,
    encode: EncodeConfig,
    distributed: DistributedConfig,
) -> ExportResult | None:
    """Bring a finished store to what its source is now; ids of rows that stay do not change.

    New and changed images are encoded in `<store>.update`, by any number of processes, and appended
    as further shards; until the manifest is replaced, at the end, readers see the old store.

    Raises:
        ConfigError: the store cannot be updated, or was made in another way, or as `export`.
    """
    there = _updatable(output, plan)
    states = pq.read_table(output / there.state, schema=STATE_SCHEMA)
    changes = find_changes(pairs, encode.rows, states, there.next_row_id, files=plan.images)
    words = f"{changes.new:,} new, {changes.changed:,} changed and {changes.vanished:,} vanished"
    log.info("%s: %s images", output, words)
    if plan.source_fingerprint == there.source_fingerprint and not len(changes.rows):
        return ExportResult(folder=output, manifest=there, reused=True)
    part, seconds = beside(output, "update"), 0.0
    if len(changes.rows):
        result = _encode_part(there, plan, pairs.take(changes.rows), part, encode, distributed)
        if result is None or not result.manifest.complete:
            return result
        seconds = result.seconds
    with Claims(output) as claims, claims.holding("append"):
        now = Manifest.read(output)
        if now == there:  # else another process has just done the same
            now = _append(there, plan, pairs, output, part, changes)
        clear(part)
        claims.clear()
    return ExportResult(
        folder=output, manifest=now, encoded=len(changes.rows), seconds=seconds, update=words
    )


def _updatable(output: Path, plan: Manifest) -> Manifest:
    """The manifest of a store that can be updated by a plan.

    Raises:
        ConfigError: it cannot.
    """
    there = Manifest.read(output)
    alike = dataclasses.replace(
        plan, source=there.source, source_fingerprint=there.source_fingerprint
    )
    if differences := there.differences(alike):
        raise ConfigError(
            f"{output} holds another encoding, which cannot be updated: {'; '.join(differences)}; "
            "choose another folder with encode.output=..., or replace it with encode.overwrite=true"
        )
    why = ""
    if not there.is_whole(output):
        why = "it lacks files"
    elif not there.state or not (output / there.state).exists():
        why = "it does not say what its pictures were (a merged store, or an older version's)"
    if why:
        raise ConfigError(
            f"the store {output} cannot be updated: {why}; encode anew with encode.overwrite=true"
        )
    return there


def _encode_part(
    there: Manifest,
    plan: Manifest,
    pairs: PairTable,
    part: Path,
    encode: EncodeConfig,
    distributed: DistributedConfig,
) -> ExportResult | None:
    """Encode what is new or changed as a store of its own, exactly as the store was made."""
    as_there = (
        *("dim", "text_length", "model", "config", "preprocessing", "tokenizer"),
        *("batch_size", "threads"),
    )
    plan = dataclasses.replace(
        plan,
        source_rows=len(pairs),
        source_fingerprint=fingerprint(pairs),
        **{name: getattr(there, name) for name in as_there},
    )
    job = ExportJob(
        checkpoint=Path(plan.checkpoint),
        pairs=pairs,
        output=part,
        folder=part,
        plan=plan,
        encode=encode,
        distributed=distributed,
        part=True,
    )
    return launch(run_export, distributed, job)


def _append(
    there: Manifest, plan: Manifest, pairs: PairTable, output: Path, part: Path, changes: Changes
) -> Manifest:
    """Put an encoded part into a store: shards, tombstones, states, errors; the manifest last."""
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
    next_row_id, gone = _without_unreadable(changes, states, set(store.row_ids().tolist()))
    whole = changes.states(states)
    readable = pc.equal(whole["reason"], "")
    deleted = np.concatenate([store.deleted(), np.array(changes.deleted + gone, np.int64)])
    number = there.updates + 1
    manifest = dataclasses.replace(
        there,
        rows=pc.sum(whole.filter(readable)["rows"]).as_py() or 0,
        source_rows=len(pairs),
        errors=len(pairs) - (pc.sum(readable).as_py() or 0),
        source=plan.source,
        source_fingerprint=plan.source_fingerprint,
        state=f"source_{number}.parquet",
        next_row_id=next_row_id,
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
    changes: Changes, encoded: pa.Table, alive: set[int]
) -> tuple[int, list[int]]:
    """Ids of rows whose picture cannot be read any more; should it be mended, it gets new ones.

    Returns:
        The first id that is free after that, and the ids.
    """
    next_row_id = changes.next_row_id
    gone: list[int] = []
    for row, reason in zip(changes.rows.tolist(), encoded["reason"].to_pylist(), strict=True):
        first, count = int(changes.first_ids[row]), int(changes.counts[row])
        if reason and first in alive:
            gone += range(first, first + count)
            changes.first_ids[row] = next_row_id
            next_row_id += count
    return next_row_id, gone


def _write_errors(output: Path, pairs: PairTable, states: pa.Table) -> None:
    reasons = states["reason"].to_pylist()
    errors = [
        {"source_row": row, "path": name_of_row(pairs, row), "reason": reason}
        for row, reason in enumerate(reasons)
        if reason
    ]
    with replacing(output / ERRORS) as temporary:
        pq.write_table(pa.Table.from_pylist(errors, ERROR_SCHEMA), temporary)
