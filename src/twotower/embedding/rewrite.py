"""Stores written anew from the rows of others: several into one, or one in the source's order."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import shutil
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from twotower.checkpoint.atomic import replacing
from twotower.console import progress
from twotower.embedding.claims import Claims
from twotower.embedding.fingerprint import check_fingerprint
from twotower.embedding.folders import beside, clear, replace_store
from twotower.embedding.layout import (
    ERROR_SCHEMA,
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

_SETTINGS = {name: f"encode.{name}" for name in ("images", "texts")} | {"rows_kind": "encode.rows"}


def merge_stores(inputs: Sequence[Path], output: Path) -> Manifest:
    """Put the rows of several stores into a new one, a shard after the other.

    The ids of the first store stay; those of each further one are moved behind the ones before. A
    picture that is in two stores is in the new one twice, which is said in the log.

    Raises:
        ConfigError: fewer than two stores, they were made in different ways, `output` is there
            already, or the disk is full.
    """
    stores = [EmbeddingStore.open(path) for path in inputs]
    _check_alike(stores)
    with Claims(output) as claims, claims.working("merge"), claims.holding("append"):
        _check_not_there(output)
        new, manifest = _begin(output), _merged(stores)
        schema = _one_schema(stores)
        shards: list[Shard] = []
        errors: list[pa.Table] = [ERROR_SCHEMA.empty_table()]
        seen = _Pictures()
        first_id = first_row = 0
        with progress("merging", manifest.rows, "rows") as line:
            for store in stores:
                for place, shard in enumerate(store.manifest.shards):
                    table = store.table(place)
                    if not len(table):
                        continue
                    seen.add(table["image_path"].to_pylist())
                    ids = table["row_id"].to_numpy() + first_id
                    rows = table["source_row"].to_numpy() + first_row
                    table = _as(schema, with_ids(table, ids, rows))
                    source = range(first_row, first_row + shard.source_rows)
                    vectors = _vectors(store, place)
                    shards.append(_write(new, manifest, len(shards), source, *vectors, table))
                    line.advance(len(table))
                seen.end_store()
                found = pq.read_table(store.folder / ERRORS, schema=ERROR_SCHEMA)
                moved = pc.add(found["source_row"], first_row)
                errors.append(found.set_column(0, "source_row", moved))
                first_id += _next_row_id(store)
                first_row += store.manifest.source_rows
        _write_table(new / ERRORS, pa.concat_tables(errors))
        manifest = dataclasses.replace(manifest, complete=True, shards=tuple(shards))
        manifest.write(new)
        _put(new, output)
    if seen.repeated:
        log.warning(
            "%d pictures are in more than one of the stores, and %s has all their rows",
            seen.repeated,
            output,
        )
    return manifest


def _check_alike(stores: Sequence[EmbeddingStore]) -> None:
    """Refuse stores that cannot become one.

    Raises:
        ConfigError: why.
    """
    if len({store.folder.resolve() for store in stores}) < max(2, len(stores)):
        raise ConfigError(
            "store merge joins two stores or more; name each once, as in "
            "stores.inputs=[models/a/store,models/b/store]"
        )
    first = stores[0]
    for store in stores:
        if not store.manifest.shards:
            raise ConfigError(f"{store.folder} is of the older layout and cannot be merged")
    for store in stores[1:]:
        check_fingerprint(
            first.manifest, f"the store {first.folder}", store.manifest, str(store.folder)
        )
        for name in ("rows_kind", "images", "texts", "dim"):
            here, there = getattr(first.manifest, name), getattr(store.manifest, name)
            if here != there:
                raise ConfigError(
                    f"{first.folder} and {store.folder} cannot be merged: "
                    f"{_SETTINGS.get(name, name)} is {here} in one and {there} in the other"
                )


class _Pictures:
    """Counts the pictures that come in more than one store, in eight bytes each."""

    def __init__(self) -> None:
        self.repeated = 0
        self._before: IntArray = np.empty(0, np.int64)
        self._now: list[IntArray] = []

    def add(self, paths: Sequence[str]) -> None:
        self._now.append(np.fromiter(map(hash, paths), np.int64, len(paths)))

    def end_store(self) -> None:
        now = np.unique(np.concatenate([np.empty(0, np.int64), *self._now]))
        self.repeated += len(np.intersect1d(self._before, now, assume_unique=True))
        self._before, self._now = np.union1d(self._before, now), []


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
        new = _begin(folder)
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
                shards.append(_write(new, manifest, number, source, images, texts, table))
                line.advance(len(ids))
        _write_table(new / ERRORS, pq.read_table(folder / ERRORS))
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


def _vectors(store: EmbeddingStore, place: int) -> tuple[FloatRows | None, FloatRows | None]:
    images = store.shard_rows(IMAGES, place) if store.has_images else None
    return images, store.shard_rows(TEXTS, place) if store.has_texts else None


def _next_row_id(store: EmbeddingStore) -> int:
    """The first id that no row has had; stores of the older versions do not say."""
    ids = store.row_ids()
    return store.manifest.next_row_id or (int(ids.max()) + 1 if len(ids) else 0)


def _merged(stores: Sequence[EmbeddingStore]) -> Manifest:
    manifests = [store.manifest for store in stores]
    source_rows = sum(manifest.source_rows for manifest in manifests)
    marks = json.dumps([manifest.source_fingerprint for manifest in manifests])
    return dataclasses.replace(
        manifests[0],
        complete=False,
        rows=sum(manifest.rows for manifest in manifests),
        source_rows=source_rows,
        errors=sum(manifest.errors for manifest in manifests),
        # So that the names of the files sort, whatever the shards of the parts were.
        shard_rows=max(1, source_rows // max(1, sum(len(m.shards) for m in manifests))),
        source=" + ".join(manifest.source for manifest in manifests),
        source_fingerprint=hashlib.sha256(marks.encode()).hexdigest(),
        state="",
        next_row_id=sum(_next_row_id(store) for store in stores),
        updates=0,
        deleted=0,
        shards=(),
    )


def _one_schema(stores: Sequence[EmbeddingStore]) -> pa.Schema:
    """The columns of all stores; what one of them lacks is null in its rows."""
    schemas = [
        pq.read_schema(store.folder / shard.file(METADATA)).remove_metadata()
        for store in stores
        for shard in store.manifest.shards
    ]
    try:
        return pa.unify_schemas(schemas, promote_options="permissive")
    except pa.ArrowException as error:
        raise ConfigError(
            f"the metadata of these stores has a column of two kinds: {error}; encode one of them "
            "anew with encode.metadata=false"
        ) from error


def _as(schema: pa.Schema, table: pa.Table) -> pa.Table:
    whole = pa.concat_tables([schema.empty_table(), table], promote_options="permissive")
    return whole.select(schema.names).cast(schema)


def _write(
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
    _write_table(folder / name, metadata)
    files[name] = described_file(folder / name)
    return Shard(
        shard=number,
        first_source_row=source.start,
        source_rows=len(source),
        rows=len(metadata),
        errors=0,
        files=files,
    )


def _write_table(path: Path, table: pa.Table) -> None:
    with replacing(path) as temporary:
        pq.write_table(table, temporary, row_group_size=ROWS_PER_GROUP)


def _check_not_there(output: Path) -> None:
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise ConfigError(f"{output} is there already; give path=... a new folder")


def _begin(output: Path) -> Path:
    """The folder beside a store that it is written in, empty."""
    new = beside(output, "new")
    clear(new)
    if new.exists():
        raise ConfigError(f"{new} holds files of others; move them away")
    return new


def _put(new: Path, output: Path) -> None:
    try:
        if output.exists():
            output.rmdir()
        new.rename(output)
    except OSError as error:
        raise ConfigError(f"cannot give {new} the name {output}: {error.strerror}") from error
