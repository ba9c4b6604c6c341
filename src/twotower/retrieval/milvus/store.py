"""A store in a Milvus collection: loaded once, continued where it was interrupted, then opened."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
from collections.abc import Iterator
from typing import Any

import numpy as np

from twotower.embedding.store import EmbeddingStore
from twotower.retrieval.build import shards_of, store_fingerprint
from twotower.retrieval.index import AnyFloatArray, IdArray, Modality, as_searched
from twotower.retrieval.milvus.collection import MilvusConfig
from twotower.retrieval.milvus.filters import field_kind, translate
from twotower.retrieval.milvus.index import MilvusIndex
from twotower.settings import ConfigError

log = logging.getLogger(__name__)


def open_collection(
    config: MilvusConfig, store: EmbeddingStore, modality: Modality = Modality.images
) -> MilvusIndex:
    """The collection of a store's pictures or captions; what it lacks of them is loaded.

    Its name tells the rows and the settings; one that is named by the config has them as its
    description.

    Raises:
        ConfigError: it holds other rows, or the store lacks the modality or a column.
    """
    fingerprint = _fingerprint(config, store, modality)
    name = config.collection or f"twotower_{fingerprint[:32]}"
    index = MilvusIndex(dataclasses.replace(config, collection=name), store.manifest.dim)
    known = np.empty(0, np.int64)
    if index.collection.exists():
        if index.collection.description() != fingerprint:
            raise ConfigError(
                f"the Milvus collection {name} was made from other rows or with other settings; "
                "choose another index.collection, or drop it"
            )
        index.open()
        known = index.collection.ids()
    else:
        shards_of(store, modality)  # refuses what the store does not have
        index.create(_fields(config, store), fingerprint, kept=True)
    missing = np.setdiff1d(store.row_ids(), known)
    if len(known) + len(missing) > len(store):
        raise ConfigError(
            f"the Milvus collection {name} holds rows that the store {store.folder} does not have; "
            "choose another index.collection, or drop it"
        )
    if len(missing):
        _load(index, store, missing, modality)
    index.open()
    index.warn_of_size(len(store))
    return index


def filter_of(index: MilvusIndex, store: EmbeddingStore, text: str) -> str:
    """A filter, as typed, for `MilvusIndex.search(..., where=)`.

    Raises:
        ConfigError: as `translate` does.
    """
    return translate(text, store.schema(), index.config.columns)


def _load(index: MilvusIndex, store: EmbeddingStore, missing: IdArray, modality: Modality) -> None:
    total = len(store)
    done = total - len(missing)
    log.info("loading %s of %s rows into Milvus", f"{len(missing):,}", f"{total:,}")
    for ids, rows, fields in _batches(index.config, store, missing, modality):
        searched = as_searched(rows, index.config.metric, store.manifest.normalized)
        index.collection.insert(searched, ids, fields)
        done += len(ids)
        log.debug("loaded %d of %d rows", done, total)
    index.collection.flush()


def _batches(
    config: MilvusConfig, store: EmbeddingStore, missing: IdArray, modality: Modality
) -> Iterator[tuple[IdArray, AnyFloatArray, list[dict[str, Any]]]]:
    """Rows that are missing in the order of the store, with the columns that become fields."""
    every, first = store.row_ids(), 0
    empty = dict.fromkeys(config.columns)
    for place, shard in enumerate(shards_of(store, modality)):
        ids = every[first : first + len(shard)]
        first += len(shard)
        wanted = np.flatnonzero(np.isin(ids, missing))
        if not len(wanted):
            continue
        table = store.table(place, config.columns) if config.columns else None
        for start in range(0, len(wanted), config.batch_rows):
            here = wanted[start : start + config.batch_rows]
            found = table.take(here).to_pylist() if table is not None else []
            yield ids[here], shard[here], [{**empty, **row} for row in found]


def _fields(config: MilvusConfig, store: EmbeddingStore) -> dict[str, str]:
    """Milvus's types of the columns that become fields."""
    schema = store.schema()
    for name in config.columns:
        if name not in schema.names:
            raise ConfigError(
                f"index.columns names {name}, but the store {store.folder} has "
                f"{', '.join(schema.names)}"
            )
    return {name: field_kind(name, schema.field(name).type) for name in config.columns}


def _fingerprint(config: MilvusConfig, store: EmbeddingStore, modality: Modality) -> str:
    rows = store_fingerprint(store, modality)
    made = [config.metric.name, config.index_type, sorted(config.build_params)]
    about = [rows, made, sorted(config.columns)]
    return hashlib.sha256(json.dumps(about).encode()).hexdigest()
