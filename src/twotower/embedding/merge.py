"""Several stores written into a new one, a shard after the other."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from twotower.checkpoint.atomic import is_taken
from twotower.console import progress
from twotower.embedding.claims import Claims
from twotower.embedding.fingerprint import check_fingerprint
from twotower.embedding.layout import (
    ERROR_SCHEMA,
    ERRORS,
    IMAGES,
    METADATA,
    TEXTS,
    FloatRows,
    IntArray,
    Manifest,
    Shard,
)
from twotower.embedding.rewrite import begin, write_shard, write_table
from twotower.embedding.rows import with_ids
from twotower.embedding.store import EmbeddingStore
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
        if is_taken(output):
            raise ConfigError(f"{output} is there already; give path=... a new folder")
        new, manifest = begin(output), _merged(stores)
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
                    shards.append(write_shard(new, manifest, len(shards), source, *vectors, table))
                    line.advance(len(table))
                seen.end_store()
                found = pq.read_table(store.folder / ERRORS, schema=ERROR_SCHEMA)
                moved = pc.add(found["source_row"], first_row)
                errors.append(found.set_column(0, "source_row", moved))
                first_id += _next_row_id(store)
                first_row += store.manifest.source_rows
        write_table(new / ERRORS, pa.concat_tables(errors))
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


def _put(new: Path, output: Path) -> None:
    try:
        if output.exists():
            output.rmdir()
        new.rename(output)
    except OSError as error:
        raise ConfigError(f"cannot give {new} the name {output}: {error.strerror}") from error
