from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest

from tests.retrieval.reference import brute_force
from tests.retrieval.written import clustered_rows, write_store
from twotower.config import Metric
from twotower.embedding.store import EmbeddingStore
from twotower.retrieval.build import build_index, gather, sample_positions, store_fingerprint
from twotower.retrieval.exact import ExactConfig
from twotower.retrieval.faiss_index import FaissConfig
from twotower.retrieval.index import Modality
from twotower.settings import ConfigError


@pytest.mark.parametrize("modality", list(Modality))
def test_a_store_is_searched_by_its_row_ids(store: EmbeddingStore, modality: Modality) -> None:
    shards = store.image_shards() if modality is Modality.images else store.text_shards()
    assert len(shards) == 4
    rows = np.concatenate(shards)
    index = build_index(ExactConfig(), store, modality=modality)
    queries = np.random.default_rng(0).standard_normal((4, rows.shape[1])).astype(np.float32)
    # The rows are used as the store rounded them, not normalised again.
    want = brute_force(rows, store.row_ids(), queries, 9, Metric.cosine)
    assert len(index) == len(store)
    for one, other in zip(index.search(queries, 9), want, strict=True):
        np.testing.assert_array_equal(one, other)


def test_trains_on_a_sample_over_all_shards(store: EmbeddingStore) -> None:
    index = build_index(FaissConfig(factory="IVF2,Flat", nprobe=2, sample_rows=20), store)
    exact = build_index(ExactConfig(), store)
    queries = np.concatenate(store.image_shards())[:7].astype(np.float32)
    np.testing.assert_array_equal(index.search(queries, 1).ids, exact.search(queries, 1).ids)


def test_samples_without_repetition_by_seed() -> None:
    sample = sample_positions(1000, 50, seed=3)
    assert len(set(sample.tolist())) == 50
    assert (np.diff(sample) > 0).all()
    np.testing.assert_array_equal(sample, sample_positions(1000, 50, seed=3))
    assert not np.array_equal(sample, sample_positions(1000, 50, seed=4))
    np.testing.assert_array_equal(sample_positions(7, 50, seed=3), np.arange(7))


def test_gathers_positions_through_the_shards() -> None:
    rows = np.random.default_rng(0).standard_normal((20, 3)).astype(np.float32)
    shards = [rows[:8], rows[8:8], rows[8:9], rows[9:]]
    positions = np.array([0, 7, 8, 9, 19])
    np.testing.assert_array_equal(gather(shards, positions), rows[positions])


def test_no_rows_are_refused() -> None:
    with pytest.raises(ConfigError, match="there are no rows to search"):
        build_index(ExactConfig(), np.empty((0, 4), np.float32))


def test_the_fingerprint_follows_the_rows(store: EmbeddingStore) -> None:
    images = store_fingerprint(store, Modality.images)
    assert images == store_fingerprint(EmbeddingStore.open(store.folder), Modality.images)
    assert images != store_fingerprint(store, Modality.texts)
    other = dataclasses.replace(store.manifest, checkpoint_sha256="0" * 64)
    assert images != store_fingerprint(EmbeddingStore(store.folder, other), Modality.images)


def test_the_fingerprint_follows_deletions_which_leave_the_files(tmp_path: Path) -> None:
    store = write_store(tmp_path, clustered_rows(20), {})
    found = {store_fingerprint(store, Modality.images)}
    for gone in ([3], [4], [4, 5]):
        np.save(tmp_path / "deleted.npy", np.array(gone))
        left = dataclasses.replace(store.manifest, deleted=len(gone), rows=20 - len(gone))
        found.add(store_fingerprint(EmbeddingStore(tmp_path, left), Modality.images))
    assert len(found) == 4
