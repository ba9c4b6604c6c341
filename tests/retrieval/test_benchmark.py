from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from tests.retrieval.conftest import COUNT
from twotower.commands import benchmark as command
from twotower.config import BenchmarkConfig, Config, FreeText, Metric
from twotower.embedding.store import EmbeddingStore
from twotower.retrieval import benchmark
from twotower.retrieval.benchmark import compare_indexes, draw_queries, recall_at_k
from twotower.retrieval.build import build_index
from twotower.retrieval.exact import ExactConfig, ExactIndex
from twotower.retrieval.faiss_index import FaissConfig
from twotower.retrieval.index import AnyFloatArray, IdArray, SearchResult, VectorIndex
from twotower.settings import ConfigError

NAMES = ["exact", "Flat", "IVF8,Flat", "IVF64,Flat", "SQ4"]


def some_rows(count: int, seed: int = 0) -> AnyFloatArray:
    return np.random.default_rng(seed).standard_normal((count, 16)).astype(np.float32)


def section(**settings: object) -> BenchmarkConfig:
    few = {"indexes": NAMES, "queries": [1, 4], "k": 5, "rounds": 2}
    return BenchmarkConfig(**{**few, **settings})  # type: ignore[arg-type]


def test_the_recall_column_equals_a_direct_computation() -> None:
    rows, queries = some_rows(60), some_rows(23, seed=1)
    table = compare_indexes(
        lambda config: build_index(config, rows), queries, section(), ExactConfig()
    )
    assert [(row.index, row.queries) for row in table] == [(n, q) for q in (1, 4) for n in NAMES]
    unit = (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float64)
    best = np.argsort(-(queries.astype(np.float64) @ unit.T), axis=1)[:, :5]
    for row in table:
        if row.index == "IVF64,Flat":
            assert "needs at least 64 rows to train on, but there are 60" in row.note
            assert row.recall is row.queries_per_second is row.p50_ms is None
            continue
        config = ExactConfig() if row.index == "exact" else FaissConfig(factory=row.index)
        found = build_index(config, rows).search(queries, 5).ids
        shared = [len(set(a.tolist()) & set(b.tolist())) for a, b in zip(found, best, strict=True)]
        assert row.recall == pytest.approx(sum(shared) / (23 * 5))
        assert (row.recall == 1) == (row.index in ("exact", "Flat"))
        assert row.note == ""
        assert 0 < row.p50_ms <= row.p95_ms  # type: ignore[operator]
        assert row.queries_per_second * row.build_seconds > 0  # type: ignore[operator]
    exact = next(row for row in table if row.index == "exact")
    assert exact.bytes_per_vector >= 16 * 4 + 8 + 8


@pytest.mark.parametrize("metric", list(Metric))
def test_a_row_that_is_as_good_counts_as_found(metric: Metric) -> None:
    rows = np.repeat(some_rows(10), 4, axis=0)  # rows 4 i to 4 i + 3 are the same
    queries = rows[::4] * 3
    index = ExactIndex(ExactConfig(metric=metric), 16)
    index.add(rows)
    best = index.search(queries, 2)
    twins = best.ids // 4 * 4 + (best.ids + 2) % 4
    assert not set(map(tuple, twins)) & set(map(tuple, best.ids))
    assert recall_at_k(index, queries, twins, best) == 1
    wrong = twins.copy()
    wrong[:, 1] = (wrong[:, 1] + 4) % 40
    padded = twins.copy()
    padded[0, 1] = -1
    assert recall_at_k(index, queries, padded, best) == pytest.approx(19 / 20)
    assert recall_at_k(index, queries, wrong, best) == pytest.approx(1 / 2)


class Recorder:
    """An index that writes down which one was searched with how many queries."""

    def __init__(self, name: str, calls: list[tuple[str, int]]) -> None:
        self.name, self.calls = name, calls

    def search(self, queries: AnyFloatArray, k: int) -> SearchResult:
        self.calls.append((self.name, len(queries)))
        return SearchResult(np.zeros((0, k), np.float32), np.zeros((0, k), np.int64))


def test_the_indexes_take_turns_within_a_round(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(benchmark, "CALLS", 2)
    monkeypatch.setattr(benchmark, "LEAST_CALLS", 3)
    calls: list[tuple[str, int]] = []
    indexes: dict[str, VectorIndex] = {
        name: Recorder(name, calls)  # type: ignore[dict-item]
        for name in ("a", "b")
    }
    times = benchmark._time_rounds(indexes, some_rows(5), section(rounds=3, queries=[1, 8]))
    # One call to warm up, then the timed ones: two of one query, one of eight.
    one_round = [("a", 1)] * 3 + [("b", 1)] * 3 + [("a", 8)] * 2 + [("b", 8)] * 2
    assert calls == one_round * 3
    assert {key: len(seconds) for key, seconds in times.items()} == {
        ("a", 1): 6,
        ("b", 1): 6,
        ("a", 8): 3,
        ("b", 8): 3,
    }


@pytest.mark.parametrize("rounds", [1, 3, 5, 20, 50])
@pytest.mark.parametrize("size", [1, 16, 256])
def test_percentiles_are_from_twenty_calls_at_least(size: int, rounds: int) -> None:
    calls: list[tuple[str, int]] = []
    indexes: dict[str, VectorIndex] = {"a": Recorder("a", calls)}  # type: ignore[dict-item]
    shape = section(rounds=rounds, queries=[size, size])
    times = benchmark._time_rounds(indexes, some_rows(5), shape)
    assert len(times["a", size]) == len(calls) - rounds >= 20
    assert len(times["a", size]) % rounds == 0


@pytest.mark.parametrize("name", ["exact", "IVF64,Flat"])
def test_one_index_at_one_batch_size_is_a_benchmark(
    name: str, config: Config, capsys: pytest.CaptureFixture[str]
) -> None:
    config = dataclasses.replace(config, benchmark=section(indexes=[name], queries=[3]))
    command.run(config, FreeText())
    folder = Path(config.run.logs_dir) / "run" / "benchmark"
    _, row = [json.loads(line) for line in (folder / "benchmark.jsonl").open()]
    assert (row["index"], row["queries"], row["calls"]) == (name, 3, 20 * (name == "exact"))
    assert ("timed calls" in capsys.readouterr().out) == (name == "exact")
    assert Image.open(folder / "benchmark.png").size[0] > 100


def test_queries_are_captions_where_there_are_any(store: EmbeddingStore) -> None:
    queries, what = draw_queries(store, 1000, seed=1)
    np.testing.assert_array_equal(queries, np.concatenate(store.text_shards()).astype(np.float32))
    assert what == "captions of the store"
    pictures = EmbeddingStore(store.folder, dataclasses.replace(store.manifest, texts=False))
    queries, what = draw_queries(pictures, 7, seed=1)
    rows = {row.tobytes() for row in np.concatenate(store.image_shards()).astype(np.float32)}
    assert len(queries) == 7
    assert {row.tobytes() for row in queries} <= rows
    assert what == "pictures of the store itself"


def test_prints_and_writes_table_lines_and_plot(
    config: Config, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = dataclasses.replace(
        config, benchmark=section(indexes=["exact", "Flat", "IVF64,Flat"], queries=[1, 300])
    )
    command.run(config, FreeText())
    folder = tmp_path / "logs" / "run" / "benchmark"
    assert sorted(path.name for path in folder.iterdir()) == [
        "benchmark.jsonl",
        "benchmark.md",
        "benchmark.png",
    ]
    about, *rows = [json.loads(line) for line in (folder / "benchmark.jsonl").open()]
    assert about["kind"] == "environment"
    assert about["torch_threads"] == about["faiss_threads"] == torch.get_num_threads()
    assert about["rows"] == COUNT
    assert about["queries_are"] == "captions of the store"
    assert about["faiss_blas_threshold"] > 0
    assert about["processor"] and about["numpy_blas"] and about["torch_blas"]
    assert [row["recall"] for row in rows] == [1.0, 1.0, None] * 2
    assert [row["calls"] for row in rows] == [64, 64, 0, 20, 20, 0]
    printed, written = capsys.readouterr().out, (folder / "benchmark.md").read_text()
    for row in rows[:2]:
        for text in (printed, written):
            assert f"{row['p50_ms']:.3f}" in text
            assert f"{row['queries_per_second']:,.0f}" in text
    for text in (printed, written):
        assert "IVF64,Flat: index.factory 'IVF64,Flat' needs at least 64 rows to train on" in text
        assert f"processor: {about['processor']}" in text
        assert "recall@5" in text
        assert "timed calls of each index: 64 at Q=1, 20 at Q=300" in text
    assert str(folder / "benchmark.png") in printed
    assert Image.open(folder / "benchmark.png").size[0] > 500


def test_k_beyond_the_rows_is_refused(config: Config) -> None:
    config = dataclasses.replace(config, benchmark=section(k=COUNT + 1))
    with pytest.raises(ConfigError, match="benchmark.k is 31, but the store .* has 30 rows"):
        command.run(config, FreeText())


def test_threads_of_the_config_reach_torch_and_faiss(config: Config, tmp_path: Path) -> None:
    before = torch.get_num_threads()
    try:
        distributed = dataclasses.replace(config.distributed, num_threads=2)
        small = section(indexes=["exact"], queries=[1], rounds=1, output=str(tmp_path / "out"))
        command.run(
            dataclasses.replace(config, distributed=distributed, benchmark=small), FreeText()
        )
        about = json.loads((tmp_path / "out" / "benchmark.jsonl").read_text().splitlines()[0])
        assert (about["torch_threads"], about["faiss_threads"]) == (2, 2)
    finally:
        torch.set_num_threads(before)


def test_ids_that_faiss_did_not_find_are_not_hits() -> None:
    index = ExactIndex(ExactConfig(), 16)
    index.add(some_rows(5))
    nothing: IdArray = np.full((1, 3), -1)
    assert recall_at_k(index, some_rows(1), nothing, index.search(some_rows(1), 3)) == 0
