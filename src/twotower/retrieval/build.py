"""From embeddings to an index: a sample to train on, then shard after shard."""

from __future__ import annotations

import hashlib
import json
import logging
import time
from collections.abc import Sequence

import numpy as np

from twotower.config import IndexConfig
from twotower.console import progress
from twotower.embedding.store import EmbeddingStore
from twotower.retrieval.index import INDEXES, AnyFloatArray, IdArray, Modality, VectorIndex
from twotower.settings import ConfigError

log = logging.getLogger(__name__)

ADD_ROWS = 65_536  # rows an index takes at a time: what a shard of a store holds by default


def build_index(
    config: IndexConfig,
    source: EmbeddingStore | AnyFloatArray,
    ids: IdArray | None = None,
    *,
    modality: Modality = Modality.images,
    seed: int = 1,
) -> VectorIndex:
    """An index of a store's pictures or captions by their row ids, or of rows (N, D) with ids (N,).

    What the index trains on is drawn by `seed` from all the rows.

    Raises:
        ConfigError: there are no rows, the store lacks the modality, or the index cannot take them.
    """
    if isinstance(source, EmbeddingStore):
        shards: Sequence[AnyFloatArray] = shards_of(source, modality)
        ids, dim, normalized = source.row_ids(), source.manifest.dim, source.manifest.normalized
    else:
        shards, dim, normalized = [source], source.shape[1], False
    count = sum(len(shard) for shard in shards)
    if not count:
        raise ConfigError("there are no rows to search: the store is empty")
    started = time.monotonic()
    index = INDEXES.build(config, dim)
    if index.train_rows:
        chosen = sample_positions(count, index.train_rows, seed)
        index.train(gather(shards, chosen), normalized=normalized)
    first = 0
    with progress("indexing", count, "rows") as bar:
        for shard in shards:
            for start in range(0, len(shard), ADD_ROWS):
                rows = shard[start : start + ADD_ROWS]
                part = None if ids is None else ids[first : first + len(rows)]
                index.add(rows, part, normalized=normalized)
                first += len(rows)
                bar.advance(len(rows))
    log.debug("indexed %d rows in %.1f s", count, time.monotonic() - started)
    return index


def shards_of(store: EmbeddingStore, modality: Modality) -> Sequence[AnyFloatArray]:
    """The memory-mapped shards of a store's pictures or captions."""
    return store.image_shards() if modality is Modality.images else store.text_shards()


def sample_positions(count: int, size: int, seed: int) -> IdArray:
    """At most `size` of the positions 0 to count - 1, drawn without repetition, ascending."""
    if size >= count:
        return np.arange(count)
    drawn = np.random.default_rng(seed).choice(count, size, replace=False)
    return np.sort(drawn).astype(np.int64)


def gather(shards: Sequence[AnyFloatArray], positions: IdArray) -> AnyFloatArray:
    """The rows at ascending positions, counted through all shards."""
    parts, first = [], 0
    for shard in shards:
        here = positions[(positions >= first) & (positions < first + len(shard))]
        parts.append(np.asarray(shard[here - first]))
        first += len(shard)
    return np.concatenate(parts)


def store_fingerprint(store: EmbeddingStore, modality: Modality) -> str:
    """Names the rows of a store: its fingerprint, its source, its files and what is deleted."""
    manifest = store.manifest
    files = [sorted(shard.files.items()) for shard in manifest.shards]
    about = [manifest.fingerprint, manifest.source_fingerprint, modality.name, files]
    if manifest.deleted:  # an update deletes rows without touching their files
        about.append(hashlib.sha256(store.deleted().tobytes()).hexdigest())
    return hashlib.sha256(json.dumps(about).encode()).hexdigest()
