"""Whether a store is what was written, and what its checkpoint gives today."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq

from twotower.checkpoint.native import file_sha256
from twotower.console import progress
from twotower.embedding.encoder import Encoder
from twotower.embedding.fingerprint import check_space
from twotower.embedding.layout import IMAGES, METADATA, TEXTS, FloatRows, Manifest, Shard
from twotower.embedding.store import EmbeddingStore
from twotower.settings import ConfigError

BLOCK = 8192
# Beyond what another processor, number of threads or precision changes.
LEAST_COSINE = {"fp32": 0.9995, "bf16": 0.99, "fp16": 0.999}


def verify_store(store: EmbeddingStore, encoder: Encoder | None, sample: int, seed: int) -> str:
    """Read every byte of a store, a block at a time, and encode some of its rows again.

    Args:
        encoder: of the store's checkpoint; None leaves the second part out.
        sample: how many rows are encoded again, drawn by `seed`.

    Returns:
        What was found, in a sentence.

    Raises:
        ConfigError: something is not as it should be.
    """
    _check_files(store)
    ids = store.row_ids()
    if len(np.unique(ids)) != len(ids):
        raise ConfigError(f"the store {store.folder} is damaged: two rows have one id")
    words = f"{len(store):,} rows in {len(store.manifest.shards)} shards are what was written"
    if encoder is None or not sample:
        return f"{store.folder}: {words}"
    description = encoder.description()
    check_space(store.manifest, store.folder, description, "this checkpoint")
    chosen = np.random.default_rng(seed).permutation(ids)[:sample]
    return f"{store.folder}: {words}, {_check_sample(store, encoder, np.sort(chosen))}"


def _check_files(store: EmbeddingStore) -> None:
    bad = []
    with progress("verifying", len(store.manifest.shards), "shards") as line:
        for shard in store.manifest.shards:
            bad += [
                f"{name} ({reason})"
                for name in shard.files
                if (reason := _fault(store.folder, store.manifest, shard, name))
            ]
            line.advance()
    if bad:
        more = f", and {len(bad) - 1} other files" if len(bad) > 1 else ""
        raise ConfigError(
            f"the store {store.folder} is damaged: {bad[0]}{more}; remove them, and "
            f"{store.manifest.repair}"
        )


def _fault(folder: Path, manifest: Manifest, shard: Shard, name: str) -> str:
    """What is wrong with a file; empty if nothing is."""
    path = folder / name
    if file_sha256(path) != shard.files[name]["sha256"]:
        return "another content than was written"
    if name.startswith(f"{METADATA}/"):
        rows = pq.read_metadata(path).num_rows
        return "" if rows == shard.rows else f"{rows} rows, not {shard.rows}"
    vectors: FloatRows = np.load(path, mmap_mode="r")
    if vectors.shape != (shard.rows, manifest.dim) or vectors.dtype != manifest.numpy_dtype:
        return f"{vectors.dtype} of shape {vectors.shape}"
    tolerance = 2e-3 if manifest.dtype == "fp16" else 1e-5
    for first in range(0, len(vectors), BLOCK):
        norms = np.linalg.norm(vectors[first : first + BLOCK].astype(np.float32), axis=1)
        if manifest.normalized and not (np.abs(norms - 1) < tolerance).all():
            return "vectors that have no unit norm"
    return ""


def _check_sample(store: EmbeddingStore, encoder: Encoder, ids: np.ndarray) -> str:
    """Encode rows again and compare; pictures that are gone by now are counted."""
    entries = store.metadata(ids)
    found = []
    if store.has_images:
        pictures = encoder.encode_images([e["image_path"] for e in entries], errors="none")
        there = [place for place, row in enumerate(pictures) if row is not None]
        gone = len(ids) - len(there)
        _compare(store, IMAGES, ids[there], store.image_rows, [pictures[p] for p in there])
        found.append(f"{len(there)} pictures give the same vectors")
        if gone:
            found.append(f"{gone} cannot be read any more")
    if store.has_texts:
        texts = encoder.encode_texts([entry["caption"] or "" for entry in entries])
        _compare(store, TEXTS, ids, store.text_rows, list(texts))
        found.append(f"{len(ids)} captions do")
    return ", ".join(found)


def _compare(
    store: EmbeddingStore,
    kind: str,
    ids: np.ndarray,
    rows_of: Callable[[np.ndarray], FloatRows],
    now: list[np.ndarray | None],
) -> None:
    if not len(ids):
        return
    cosines = (rows_of(ids).astype(np.float64) * np.array(now, np.float64)).sum(axis=1)
    worst = int(cosines.argmin())
    if cosines[worst] < LEAST_COSINE[store.manifest.precision]:
        raise ConfigError(
            f"the store {store.folder} is not what its checkpoint gives: in {kind}, row "
            f"{ids[worst]} has the cosine {cosines[worst]:.4f} with the same input encoded now; "
            "its file has changed since (encode.update=true), or the store has"
        )
