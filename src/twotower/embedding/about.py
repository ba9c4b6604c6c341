"""What `twotower store` says of a store."""

from __future__ import annotations

import logging

import pyarrow.parquet as pq

from twotower.config import Config
from twotower.distributed import resolve_device
from twotower.embedding.encoder import Encoder
from twotower.embedding.layout import METADATA
from twotower.embedding.store import EmbeddingStore
from twotower.embedding.verify import verify_store
from twotower.train_config import Precision
from twotower.wandb_files import CHECKPOINTS, local_file

log = logging.getLogger(__name__)


def about_store(store: EmbeddingStore) -> str:
    """The facts of a manifest, a line each."""
    there = store.manifest
    stored = sum(shard.rows for shard in there.shards)
    size = sum(int(f["bytes"]) for shard in there.shards for f in shard.files.values())
    parts = [name for name in ("images", "texts") if getattr(there, name)]
    facts = {
        "store": str(store.folder),
        "rows": f"{there.rows:,} ({there.rows_kind}) of dimension {there.dim}, {there.dtype}",
        "holds": f"{' and '.join(parts)} in {len(there.shards)} shards, {size / 1e6:,.1f} MB",
        "source": f"{there.source}: {there.source_rows:,} images, {there.errors:,} unreadable",
        "model": f"{there.model}, in {there.precision} on {there.device}",
        "checkpoint": f"{there.checkpoint} (SHA-256 {there.checkpoint_sha256[:16]})",
        "pictures": there.preprocessing,
        "tokenizer": there.tokenizer,
        "fingerprint": there.fingerprint,
        "updates": f"{there.updates}, {stored - there.rows:,} rows to compact",
        "columns": ", ".join(_columns(store)),
    }
    width = max(map(len, facts))
    return "\n".join(f"{name:<{width}}  {fact}".rstrip() for name, fact in facts.items())


def _columns(store: EmbeddingStore) -> list[str]:
    if not store.manifest.shards:
        return []
    path = store.folder / store.manifest.shards[0].file(METADATA)
    return list(pq.read_schema(path).names)


def verify_with_checkpoint(store: EmbeddingStore, config: Config) -> str:
    """Verify a store with the checkpoint that is asked for, that it names, or that is beside it.

    Raises:
        ConfigError: as `verify_store`, or another checkpoint made the store.
    """
    there = store.manifest
    named = local_file(config.checkpoint or there.checkpoint, CHECKPOINTS)
    places = [named] if config.checkpoint else [named, store.folder.parent / named.name]
    checkpoint = next((place for place in places if place.is_file()), None)
    encoder = None
    if checkpoint is None:
        what = f"the checkpoint {named}" if named.name else "the checkpoint of this store"
        log.warning("%s is not there: no row is encoded again", what)
    elif config.stores.sample:
        store.check_checkpoint(checkpoint)
        device = resolve_device(config.distributed)
        encoder = Encoder.load(checkpoint, device, Precision[there.precision], there.batch_size)
    return verify_store(store, encoder, config.stores.sample, config.seed)
