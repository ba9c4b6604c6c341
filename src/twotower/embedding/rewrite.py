"""A store written anew in its source's order, without rows that no longer count."""

from __future__ import annotations

import dataclasses
import logging
import shutil
from functools import lru_cache
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from twotower.checkpoint.atomic import replacing
from twotower.console import progress
from twotower.embedding.claims import Claims
from twotower.embedding.folders import beside, clear, replace_store
from twotower.embedding.layout import (
    ERRORS,
    IMAGES,
    METADATA,
    SOURCE,
    STATE_SCHEMA,
    TEXTS,
    FloatRows,
    IntArray,
    Manifest,
    Shard,
)
from twotower.embedding.rows import id_ranges, with_ids
from twotower.embedding.store import EmbeddingStore
from twotower.embedding.writer import ROWS_PER_GROUP, described_file
from twotower.settings import ConfigError

log = logging.getLogger(__name__)


def compact_store(folder: Path) -> Manifest:
    """Rewrite an updated store in its source's order, without the rows that no longer count.

    The ids stay, and `source_row` becomes the row of the source as it was at the last update.

    Raises:
        ConfigError: there is nothing to compact, or the disk is full; the store stays as it was.
    """
    with Claims(folder) as claims, claims.working("compact"), claims.holding("append"):
        store = EmbeddingStore.open(folder)
        there = store.manifest
        if not there.updates or there.state == SOURCE:
            raise ConfigError(f"the store {folder} has nothing to compact: no update changed it")
        states = pq.read_table(folder / there.state, schema=STATE_SCHEMA)
        new = begin(folder)
        manifest = dataclasses.replace(there, state=SOURCE, deleted=0)
        tables = lru_cache(maxsize=4)(store.table)
        shards = []
        with (
            progress("compacting", there.rows, "rows") as line,
            replacing(new / SOURCE) as temporary,
            pq.ParquetWriter(temporary, STATE_SCHEMA) as file,
        ):
            for number in range(manifest.num_shards):
                source = manifest.shard_range(number)
                part = states.slice(source.start, len(source))
                file.write_table(part, row_group_size=max(1, len(part)))
                ids, rows = _live(part, source.start)
                places, inside = store.locate(ids)
                parts, order = [], []
                for place in np.unique(places):
                    here = np.flatnonzero(places == place)
                    parts.append(tables(int(place)).take(pa.array(inside[here])))
                    order.append(here)
                if not parts:
                    parts, order = [tables(0).slice(0, 0)], [np.empty(0, np.int64)]
                table = pa.concat_tables(parts, promote_options="permissive")
                table = with_ids(table.take(pa.array(np.argsort(np.concatenate(order)))), ids, rows)
                images = store.image_rows(ids) if there.images else None
                texts = store.text_rows(ids) if there.texts else None
                shards.append(write_shard(new, manifest, number, source, images, texts, table))
                line.advance(len(ids))
        write_table(new / ERRORS, pq.read_table(folder / ERRORS))
        manifest = dataclasses.replace(manifest, shards=tuple(shards))
        manifest.write(new)
        replace_store(folder)
        claims.clear()
    return manifest


def _live(states: pa.Table, first_row: int) -> tuple[IntArray, IntArray]:
    """The ids of the images that can be read, in order, and the source row of each id."""
    readable = np.flatnonzero(pc.equal(states["reason"], "").to_numpy())
    first, counts = (states[name].to_numpy()[readable] for name in ("row_id", "rows"))
    return id_ranges(first, counts), np.repeat(readable + first_row, counts)


def write_shard(
    folder: Path,
    manifest: Manifest,
    number: int,
    source: range,
    images: FloatRows | None,
    texts: FloatRows | None,
    metadata: pa.Table,
) -> Shard:
    """Write a shard's files and describe them; what is mapped is a file's whole content."""
    files: dict[str, dict[str, int | str]] = {}
    for kind, rows in ((IMAGES, images), (TEXTS, texts)):
        if rows is not None:
            name = manifest.path(kind, number)
            with replacing(folder / name) as temporary:
                if isinstance(rows, np.memmap):  # a whole file; mapped pages would count as memory
                    shutil.copyfile(str(rows.filename), temporary)
                else:
                    with temporary.open("wb") as file:
                        np.save(file, rows)
            files[name] = described_file(folder / name)
    name = manifest.path(METADATA, number)
    write_table(folder / name, metadata)
    files[name] = described_file(folder / name)
    return Shard(
        shard=number,
        first_source_row=source.start,
        source_rows=len(source),
        rows=len(metadata),
        errors=0,
        files=files,
    )


def write_table(path: Path, table: pa.Table) -> None:
    """Write a Parquet file, whole or not at all."""
    with replacing(path) as temporary:
        pq.write_table(table, temporary, row_group_size=ROWS_PER_GROUP)


def begin(output: Path) -> Path:
    """The folder beside a store that it is written in, empty."""
    new = beside(output, "new")
    clear(new)
    if new.exists():
        raise ConfigError(f"{new} holds files of others; move them away")
    return new
