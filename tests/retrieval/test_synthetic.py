from __future__ import annotations

import numpy as np
import pytest

from twotower.retrieval import synthetic
from twotower.retrieval.synthetic import ClipLike, clip_like, queries_of


def test_rows_are_the_same_chunk_by_chunk_and_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(synthetic, "CHUNK", 64)
    made = ClipLike(200, 24, seed=3)
    rows = made.rows()
    assert [len(chunk) for chunk in made.chunks()] == [64, 64, 64, 8]
    np.testing.assert_array_equal(rows, np.concatenate(list(made.chunks())))
    np.testing.assert_array_equal(rows, clip_like(200, 24, seed=3))
    np.testing.assert_array_equal(rows[128:192], made.chunk(2))
    np.testing.assert_array_equal(rows[:100], made.head(100))
    np.testing.assert_array_equal(rows, made.head(1000))
    np.testing.assert_allclose(np.linalg.norm(rows, axis=1), 1, atol=1e-6)
    assert not np.array_equal(rows, clip_like(200, 24, seed=4))
    assert len(np.unique(rows, axis=0)) == 200


def test_the_cone_and_the_modality_gap_are_there() -> None:
    made = ClipLike(2000, 64)
    rows = made.rows()
    mean = rows.mean(axis=0)
    pictures, texts = made.queries(100, cross=False), made.queries(100, cross=True)
    np.testing.assert_allclose(np.linalg.norm(texts, axis=1), 1, atol=1e-6)
    cosine = float((mean**2).sum())  # of two rows, on average
    assert 0.4 < cosine < 0.7
    assert (pictures @ mean).mean() > cosine / 2
    assert abs((texts @ mean).mean()) < 0.15
    # Both are near a row all the same: the nearest one stands out from the others.
    for queries in (pictures, texts):
        scores = queries @ rows.T
        assert (scores.max(axis=1) - scores.mean(axis=1)).mean() > 4 * scores.std(axis=1).mean() / 2


def test_energy_falls_with_the_dimension_and_rows_cluster() -> None:
    rows = clip_like(2000, 64)
    energy = rows.var(axis=0)
    assert energy[:8].mean() > 3 * energy[-32:].mean()
    own = rows - rows.mean(axis=0)
    own /= np.linalg.norm(own, axis=1, keepdims=True)
    cosines = own @ own.T
    np.fill_diagonal(cosines, -1)
    assert np.median(cosines.max(axis=1)) > 0.5


def test_queries_are_drawn_by_seed_and_kind() -> None:
    rows = clip_like(100, 8)
    np.testing.assert_array_equal(queries_of(rows, 7, True), queries_of(rows, 7, True))
    assert not np.array_equal(queries_of(rows, 7, True), queries_of(rows, 7, True, seed=5))
    assert not np.array_equal(queries_of(rows, 7, True), queries_of(rows, 7, False))
