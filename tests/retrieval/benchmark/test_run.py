from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from tests.retrieval.benchmark.helpers import ArrayData, section, some_rows
from tests.retrieval.conftest import COUNT
from twotower.benchmark_config import BenchmarkConfig, QueryKind
from twotower.commands import benchmark as command
from twotower.config import Config, FreeText
from twotower.embedding.store import EmbeddingStore
from twotower.retrieval.benchmark import limits, rounds
from twotower.retrieval.benchmark.building import open_saved
from twotower.retrieval.benchmark.data import (
    StoreData,
    SyntheticData,
    draw_queries,
    open_data,
    timed_kind,
)
from twotower.retrieval.benchmark.run import busy, run
from twotower.retrieval.build import build_index
from twotower.retrieval.exact import ExactConfig
from twotower.retrieval.faiss_index import FaissConfig
from twotower.retrieval.indexing import index_store
from twotower.settings import ConfigError

FILES = [
    *("benchmark.jsonl", "benchmark.md", "benchmark.png"),
    *("benchmark_bytes.png", "benchmark_recall.png"),
]


@pytest.fixture(autouse=True)
def small_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "READ_BYTES", 1 << 14)
    monkeypatch.setattr(limits, "SHAPE", (64, 32, 16))


def with_benchmark(config: Config, **settings: object) -> Config:
    return dataclasses.replace(config, benchmark=section(**settings))


def json_lines(folder: Path) -> dict[str, list[dict[str, object]]]:
    kinds: dict[str, list[dict[str, object]]] = {}
    for line in (folder / "benchmark.jsonl").read_text().splitlines():
        found = json.loads(line)
        kinds.setdefault(found.pop("kind"), []).append(found)
    return kinds


def test_recalls_equal_a_direct_computation_and_every_share_is_finite(config: Config) -> None:
    rows, texts = some_rows(60), some_rows(23, seed=1)
    results, interrupted = run(with_benchmark(config, k=[5, 2]), ArrayData(rows))
    assert not interrupted
    labels = [
        *("exact", "Flat", "Flat tuned", "IVF8,Flat nprobe=2", "IVF8,Flat nprobe=8"),
        *("IVF64,Flat", "SQ4"),
    ]
    assert [(row.label, row.queries, row.k) for row in results.rows] == [
        (label, queries, k) for queries in (1, 4) for k in (2, 5) for label in labels
    ]
    unit = (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float64)
    for row in results.rows:
        if row.index == "IVF64,Flat":
            assert "needs at least 64 rows to train on, but there are 60" in row.note
            assert row.text_recall is row.queries_per_second is row.share is None
            continue
        best = np.argsort(-(texts.astype(np.float64) @ unit.T), axis=1)[:, : row.k]
        nprobe = int(row.setting.partition("nprobe=")[2] or 0)
        faiss = FaissConfig(factory=row.index, nprobe=nprobe)
        alone = build_index(ExactConfig() if row.index == "exact" else faiss, rows)
        found = alone.search(texts, row.k).ids
        shared = [len(set(a.tolist()) & set(b.tolist())) for a, b in zip(found, best, strict=True)]
        assert row.text_recall == pytest.approx(sum(shared) / (23 * row.k))
        if row.index in ("exact", "Flat") or row.setting == "nprobe=8":
            assert row.text_recall == row.image_recall == 1
        else:
            assert row.image_recall is not None and row.image_recall < 1
        assert row.note == ""
        assert 0 < row.p50_ms <= row.p95_ms  # type: ignore[operator]
        assert len(row.round_ms) == 2
        assert row.queries_per_second == pytest.approx(row.queries / row.p50_ms * 1000)  # type: ignore[operator]
        assert (row.chosen != "") == (row.setting == "tuned")
        compared = row.index in ("exact", "Flat")
        assert (row.share is not None) == compared
        assert not compared or 0 < row.read_share < np.inf  # type: ignore[operator]
    exact = next(row for row in results.rows if row.index == "exact")
    assert exact.bytes_per_vector >= 16 * 4 + 8 + 8  # type: ignore[operator]


@pytest.mark.parametrize("name", ["exact", "IVF64,Flat"])
def test_one_index_at_one_batch_size_is_a_benchmark(
    name: str, config: Config, capsys: pytest.CaptureFixture[str]
) -> None:
    command.run(with_benchmark(config, indexes=[name], queries=[3]), FreeText())
    folder = Path(config.run.logs_dir) / "run" / "benchmark"
    (row,) = json_lines(folder)["measurement"]
    assert (row["index"], row["queries"], row["calls"]) == (name, 3, 20 * (name == "exact"))
    assert ("timed calls" in capsys.readouterr().out) == (name == "exact")
    for file in FILES[2:]:
        assert Image.open(folder / file).size[0] > 100


def test_prints_and_writes_tables_lines_and_plots(
    config: Config, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    names = ["exact", "Flat", "IVF64,Flat"]
    command.run(with_benchmark(config, indexes=names, queries=[1, 300], k=[5, 10]), FreeText())
    folder = tmp_path / "logs" / "run" / "benchmark"
    assert sorted(path.name for path in folder.iterdir()) == FILES
    found = json_lines(folder)
    (about,), rows = found["environment"], found["measurement"]
    assert about["torch_threads"] == about["faiss_threads"] == torch.get_num_threads()
    assert (about["rows"], about["recall_queries"]) == (COUNT, f"{COUNT} image, {COUNT} text")
    assert about["timed_queries"] == f"{COUNT} captions of the store"
    for name in ("processor", "numpy_blas", "torch_blas", "exact", "faiss_blas_threshold", "data"):
        assert about[name]
    assert set(found["limits"][0]) == {"read", "fp32", "int8"}
    assert [row["text_recall"] for row in rows] == [1.0, 1.0, 1.0, None] * 4
    assert [row["calls"] for row in rows] == [64, 64, 64, 0] * 2 + [20, 20, 20, 0] * 2
    printed, written = capsys.readouterr().out, (folder / "benchmark.md").read_text()
    for text in (printed, written):
        for row in rows[:3]:
            assert f"{row['p50_ms']:.3f}" in text
            assert f"{row['queries_per_second']:,.0f}" in text
        assert "IVF64,Flat: index.factory 'IVF64,Flat' needs at least 64 rows to train on" in text
        assert f"processor: {about['processor']}" in text
        assert "text R@5" in text and "image R@10" in text
        assert "timed calls: 64 at Q=1 k=5,10" in text and "timed calls: 20 at Q=300" in text
        assert "exact, in Flat's speed as it is / tuned, k=5: " in text
        assert "Flat tuned: 1 thread, BLAS threshold" in text
        assert "limits of this machine: reading " in text
    tables = [line for line in printed.splitlines() if line.startswith(("exact  ", "IVF64,Flat  "))]
    assert len(tables) == 2 + 2 * 2  # what was not measured stands in the table of indexes alone
    assert max(map(len, tables)) <= 120
    assert str(folder / "benchmark.png") in printed
    assert Image.open(folder / "benchmark_recall.png").size[0] > 500


def test_synthetic_rows_need_no_store(config: Config) -> None:
    config = dataclasses.replace(config, store="")
    config = with_benchmark(config, rows=90, dim=24, indexes=["exact", "Flat"], queries=[2])
    command.run(config, FreeText())
    found = json_lines(Path(config.run.logs_dir) / "run" / "benchmark")
    (about,) = found["environment"]
    assert about["data"] == "synthetic, CLIP-like, 90 x 24, seed 1"
    assert about["timed_queries"] == "1000 synthetic texts"
    for row in found["measurement"]:
        assert row["text_recall"] == row["image_recall"] == 1


def test_ctrl_c_reports_what_was_measured_and_stops(
    config: Config, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    made = rounds.run_rounds

    def interrupted(*arguments: object) -> rounds.Times:
        times = made(*arguments)  # type: ignore[arg-type]
        for (name, _), found in times.rounds.items():
            if name == "SQ8":
                found.clear()
        times.interrupted = True
        times.notes.append("stopped in round 1 of 2 by Ctrl-C")
        return times

    monkeypatch.setattr(rounds, "run_rounds", interrupted)
    with pytest.raises(KeyboardInterrupt):
        command.run(with_benchmark(config, indexes=["exact", "SQ8"], queries=[2]), FreeText())
    found = json_lines(Path(config.run.logs_dir) / "run" / "benchmark")
    exact, other = found["measurement"]
    assert exact["queries_per_second"] and other["queries_per_second"] is None
    assert other["note"] == "stopped before Q=2 k=5"
    assert {"text": "stopped in round 1 of 2 by Ctrl-C"} in found["note"]
    assert "by Ctrl-C" in capsys.readouterr().out


def test_a_busy_machine_is_named(caplog: pytest.LogCaptureFixture) -> None:
    assert busy(None) == busy(0.05) == []
    assert not caplog.records
    (text,) = busy(0.634)
    assert text.startswith("other processes used 63% of the cores")
    assert [record.getMessage() for record in caplog.records] == [text]


def test_queries_are_captions_and_pictures_with_their_own_rows(store: EmbeddingStore) -> None:
    data = StoreData(store)
    found = draw_queries(data, section(), seed=1)
    texts, pictures = found[QueryKind.text], found[QueryKind.image]
    assert texts.own is None
    assert (texts.what, pictures.what) == ("captions of the store", "pictures of the store itself")
    rows = np.concatenate(list(data.chunks())).astype(np.float32)
    assert data.ids is not None and pictures.own is not None
    places = np.searchsorted(data.ids, pictures.own)
    assert sorted(places) == list(range(COUNT))
    assert places[:10].max() >= COUNT // 2 > places[:10].min()  # not the first of the store alone
    np.testing.assert_array_equal(pictures.vectors, rows[places])
    captions = np.concatenate(store.text_shards()).astype(np.float32)
    np.testing.assert_array_equal(texts.vectors, captions[places])
    assert timed_kind(found, QueryKind.auto) is QueryKind.text
    assert timed_kind(found, QueryKind.image) is QueryKind.image
    bare = EmbeddingStore(store.folder, dataclasses.replace(store.manifest, texts=False))
    found = StoreData(bare).queries(7, seed=1)
    assert list(found) == [QueryKind.image] and len(found[QueryKind.image].vectors) == 7
    assert timed_kind(found, QueryKind.auto) is QueryKind.image
    with pytest.raises(ConfigError, match="benchmark.timed=text needs captions"):
        timed_kind(found, QueryKind.text)


def test_synthetic_data_are_streamed_and_sampled_alike() -> None:
    data = SyntheticData(50, 8, seed=2)
    rows = np.concatenate(list(data.chunks()))
    np.testing.assert_array_equal(data.sample(20, seed=9), rows[:20])
    assert len(data.sample(99, seed=9)) == 50
    assert {kind: len(found.vectors) for kind, found in data.queries(7, 1).items()} == {
        QueryKind.image: 7,
        QueryKind.text: 7,
    }


def test_k_beyond_the_rows_is_refused(config: Config) -> None:
    with pytest.raises(ConfigError, match="benchmark.k is 31, but the store .* has 30 rows"):
        open_data(with_benchmark(config, k=[1, COUNT + 1]))
    with pytest.raises(ConfigError, match="benchmark.k is 5, but benchmark.rows is 4"):
        open_data(with_benchmark(config, rows=4))


def test_threads_of_the_config_reach_torch_and_faiss(config: Config, tmp_path: Path) -> None:
    before = torch.get_num_threads()
    try:
        distributed = dataclasses.replace(config.distributed, num_threads=2)
        config = dataclasses.replace(config, distributed=distributed)
        output = str(tmp_path / "out")
        config = with_benchmark(config, indexes=["exact"], queries=[1], rounds=1, output=output)
        command.run(config, FreeText())
        (about,) = json_lines(tmp_path / "out")["environment"]
        assert (about["torch_threads"], about["faiss_threads"]) == (2, 2)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize(
    ("k", "values"), [(10, [10]), ([10], [10]), ([100, 1, 10, 1], [1, 10, 100])]
)
def test_k_is_a_number_or_several(k: object, values: list[int]) -> None:
    assert BenchmarkConfig(k=k).k_values == values


@pytest.mark.parametrize(
    ("k", "sentence"),
    [
        ([], "benchmark.k is empty; give at least one, as in k=\\[10,100\\]"),
        ([1, 0], "benchmark.k must be at least 1, not 0"),
        ("ten", "benchmark.k must be a whole number, or a list of them, not ten"),
        ([1, 2.5], "benchmark.k must be a whole number"),
        (True, "benchmark.k must be a whole number"),
    ],
)
def test_what_is_no_number_of_results_is_refused(k: object, sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        BenchmarkConfig(k=k)


def test_saved_indexes_take_part_as_they_were_saved(config: Config, tmp_path: Path) -> None:
    folders = [str(tmp_path / name) for name in ("graph", "codes")]
    asked = (FaissConfig(factory="HNSW8", ef_search=7), FaissConfig(factory="SQ8", rerank=2))
    for folder, index in zip(folders, asked, strict=True):
        index = dataclasses.replace(index, folder=folder)
        index_store(dataclasses.replace(config, index=index), FreeText())
    section = {"indexes": ["exact"], "queries": [2], "saved": folders}
    command.run(with_benchmark(config, **section), FreeText())
    rows = json_lines(Path(config.run.logs_dir) / "run" / "benchmark")["measurement"]
    assert [(row["index"], row["setting"]) for row in rows] == [
        ("exact", ""),
        ("graph", ""),
        ("codes", ""),
    ]
    assert rows[2]["text_recall"] == rows[2]["image_recall"] == 1.0
    assert all(row["p50_ms"] for row in rows)
    twins = [str(tmp_path / name / "same") for name in ("one", "other")]
    for twin in twins:
        shutil.copytree(folders[0], twin)
    data = open_data(config)
    assert list(open_saved([*twins, folders[1]], config.index, data)) == [*twins, "codes"]
    assert list(open_saved(folders, config.index, data, ["graph"])) == [folders[0], "codes"]
    with pytest.raises(ConfigError, match="holds no index"):
        open_saved([str(tmp_path / "nothing")], config.index, data)
    with pytest.raises(ConfigError, match="indexes are saved of stores"):
        open_saved(folders, config.index, SyntheticData(30, 8, seed=1))
