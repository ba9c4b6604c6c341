"""Several stores, parts of one, pictures or captions: all against a brute force."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from tests.helpers import tiny_bundle
from tests.retrieval.reference import brute_force
from tests.retrieval.written import clustered_rows, write_store
from twotower.commands import search
from twotower.config import Config, FreeText, IndexConfig, Metric
from twotower.embedding.encoder import Encoder
from twotower.embedding.store import EmbeddingStore
from twotower.retrieval.exact import ExactConfig
from twotower.retrieval.faiss_index import FaissConfig
from twotower.retrieval.kept import kept_folder
from twotower.retrieval.search.opening import open_collections, open_stores, partitions
from twotower.retrieval.search.searcher import Hit, Options, Searcher
from twotower.search_config import SearchConfig, Searched
from twotower.settings import ConfigError

ROWS = clustered_rows(600)
CLASSES = [None if row % 50 == 0 else ["cat", "dog", "a fox"][row % 3] for row in range(600)]
QUERIES = np.random.default_rng(3).standard_normal((4, 12)).astype(np.float32)


@pytest.fixture
def stores(tmp_path: Path) -> Path:
    """Three stores in a folder, whose ids are all from 0 on."""
    for name, part in (("a", slice(0, 200)), ("b", slice(200, 450)), ("c", slice(450, 600))):
        write_store(tmp_path / "stores" / name, ROWS[part], {"class": CLASSES[part]}, 64)
    return tmp_path / "stores"


def searcher(config: Config, folder: Path, index: IndexConfig, **options: object) -> Searcher:
    made = dataclasses.replace(config, index=index, search=SearchConfig(**options))  # type: ignore[arg-type]
    found = open_stores(folder, [] if index.partition_by else index.collections)
    return Searcher(Encoder(tiny_bundle()), *open_collections(made, found))


def names(hits: list[Hit]) -> list[tuple[str, int]]:
    return [(hit.collection, hit.row_id) for hit in hits]


@pytest.mark.parametrize("index", [ExactConfig, FaissConfig])
@pytest.mark.parametrize(("chosen", "parts"), [([], "abc"), (["c", "a"], "ca"), (["b"], "b")])
def test_stores_are_searched_together_and_chosen_by_name(
    chosen: list[str], parts: str, index: type[IndexConfig], stores: Path, config: Config
) -> None:
    first = {"a": 0, "b": 200, "c": 450}
    last = {"a": 200, "b": 450, "c": 600}
    place = [(name, row) for name in parts for row in range(first[name], last[name])]
    rows = ROWS[[row for _, row in place]]
    found = searcher(config, stores, index(collections=chosen)).search_vectors(
        QUERIES, Options(k=30)
    )
    want = brute_force(rows, np.arange(len(rows)), QUERIES, 30, Metric.cosine).ids
    for hits, ids in zip(found, want, strict=True):
        best = [place[row] for row in ids]
        expected = [(name if len(parts) > 1 else "", row - first[name]) for name, row in best]
        assert names(hits) == expected


def test_a_path_is_the_name_of_a_store_too(stores: Path, config: Config, tmp_path: Path) -> None:
    path = str(stores / "b")
    shutil.move(stores / "c", tmp_path / "c")
    chosen = [path, str(tmp_path / "c")]
    hits = searcher(config, tmp_path / "none", ExactConfig(collections=chosen)).search_vectors(
        QUERIES, Options(k=400)
    )
    assert {hit.collection for hit in hits[0]} == set(chosen)
    with pytest.raises(ConfigError, match="index.collections names x, but .*stores has a, b$"):
        open_stores(stores, ["a", "x"])
    with pytest.raises(ConfigError, match="names x, but no folder has this name"):
        open_stores(stores / "a", ["x"])
    with pytest.raises(ConfigError, match="no embedding store at"):
        open_stores(tmp_path / "none", [])
    with pytest.raises(ConfigError, match="search.k is 401, but the collections .* has 400 rows"):
        searcher(config, stores, ExactConfig(collections=chosen)).search(["a"], Options(k=401))


@pytest.mark.parametrize("chosen", [[], ["dog", "a fox"], ["cat"]])
def test_a_column_makes_a_collection_a_value(
    chosen: list[str], config: Config, tmp_path: Path
) -> None:
    store = write_store(tmp_path / "store", ROWS, {"class": CLASSES}, 100)
    parts = partitions(store, "class")
    assert list(parts) == ["a fox", "cat", "dog"]
    for value, ids in parts.items():
        assert ids.tolist() == [row for row in range(600) if CLASSES[row] == value]
    index = ExactConfig(partition_by="class", collections=chosen)
    made = searcher(config, store.folder, index)
    assert [len(part) for part in made.collections] == [
        len(ids) for name, ids in parts.items() if name in (chosen or parts)
    ]
    ids = np.sort(np.concatenate([parts[name] for name in chosen or parts]))
    want = brute_force(ROWS[ids], ids, QUERIES, 25, Metric.cosine).ids
    for hits, best in zip(made.search_vectors(QUERIES, Options(k=25)), want, strict=True):
        assert [hit.row_id for hit in hits] == best.tolist()
        several = len(chosen) != 1
        assert [hit.collection for hit in hits] == [CLASSES[row] if several else "" for row in best]
    even = ids[ids % 2 == 0]
    want = brute_force(ROWS[even], even, QUERIES, 25, Metric.cosine).ids
    filtered = made.search_vectors(QUERIES, Options(k=25, filter=f"row_id in {even.tolist()}"))
    assert [[hit.row_id for hit in hits] for hits in filtered] == want.tolist()


def test_values_of_several_stores_are_told_apart(stores: Path, config: Config) -> None:
    made = searcher(config, stores, ExactConfig(partition_by="class", collections=["dog"]))
    assert [part.name for part in made.collections] == ["a/dog", "b/dog", "c/dog"]
    dogs = np.array([row for row in range(600) if CLASSES[row] == "dog"])
    want = brute_force(ROWS[dogs], dogs, QUERIES, 9, Metric.cosine).ids
    first = {"a/dog": 0, "b/dog": 200, "c/dog": 450}
    for hits, ids in zip(made.search_vectors(QUERIES, Options(k=9)), want, strict=True):
        assert [hit.row_id + first[hit.collection] for hit in hits] == ids.tolist()
        np.testing.assert_array_equal(made.vectors(hits), ROWS[ids])


def test_numbers_partition_too_and_what_does_not_is_refused(config: Config, tmp_path: Path) -> None:
    columns = {
        "year": pa.array([2000 + row % 2 for row in range(600)], pa.int16()),
        "tags": [["x"]] * 600,
        "each": list(range(600)),
    }
    store = write_store(tmp_path / "store", ROWS, columns, 100)
    assert [len(ids) for ids in partitions(store, "year").values()] == [300, 300]
    made = searcher(config, store.folder, ExactConfig(partition_by="year", collections=["2001"]))
    assert {hit.row_id % 2 for hit in made.search(["a"], Options(k=300))[0]} == {1}
    for column, chosen, sentence in (
        ("size", [], "names the column size, but the store .* has image_path, caption, row_id"),
        ("tags", [], "index.partition_by=tags holds list<.*; it takes a column of one text"),
        ("year", ["1999"], "index.collections names 1999, but the column year has 2000, 2001"),
    ):
        with pytest.raises(ConfigError, match=sentence):
            searcher(config, store.folder, ExactConfig(partition_by=column, collections=chosen))


def test_too_many_values_are_refused_unless_some_are_chosen(
    config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("twotower.retrieval.search.opening.MOST_PARTS", 100)
    store = write_store(tmp_path / "store", ROWS, {"each": list(range(600))}, 100)
    with pytest.raises(ConfigError, match="each has 600 values, and index.partition_by makes at"):
        searcher(config, store.folder, ExactConfig(partition_by="each"))
    few = ExactConfig(partition_by="each", collections=["7", "5"])
    hits = searcher(config, store.folder, few).search(["a"], Options(k=2))[0]
    assert {(hit.collection, hit.row_id) for hit in hits} == {("5", 5), ("7", 7)}


@pytest.mark.parametrize("index", [ExactConfig(), FaissConfig(factory="HNSW8")])
def test_captions_are_searched_where_they_are_asked_for(
    index: IndexConfig, config: Config, tmp_path: Path
) -> None:
    captions = clustered_rows(100, seed=9)
    store = write_store(tmp_path / "store", ROWS[:100], {}, 30, texts=captions)
    for modality, rows in ((Searched.text, captions), (Searched.image, ROWS[:100])):
        hits = searcher(config, store.folder, index, modality=modality).search_vectors(
            rows[40:44], Options(k=1)
        )
        assert [[hit.row_id for hit in found] for found in hits] == [[40], [41], [42], [43]]
        options = Options(k=5, filter="row_id < 30", duplicates=0.9)
        for hit in searcher(config, store.folder, index, modality=modality).search_vectors(
            rows[40:41], options
        )[0]:
            assert hit.row_id < 30
    if isinstance(index, FaissConfig):
        assert kept_folder(index, store).is_dir()
        assert Path(f"{kept_folder(index, store)}-texts").is_dir()


def test_collections_do_not_change_a_kept_index(
    config: Config, stores: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    index = FaissConfig(factory="HNSW8")
    searcher(config, stores, index)
    monkeypatch.setattr("twotower.retrieval.kept.build_index", None)
    chosen = dataclasses.replace(index, collections=["a"])
    assert len(searcher(config, stores, chosen)) == 200


@pytest.mark.usefixtures("any_checkpoint")
def test_the_command_shows_where_hits_are_from(
    config: Config, store: EmbeddingStore, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("one", "other"):
        (tmp_path / "all").mkdir(exist_ok=True)
        (tmp_path / "all" / name).symlink_to(store.folder)
    checkpoint = str(store.folder.parent / "best.safetensors")
    config = dataclasses.replace(
        config,
        store=str(tmp_path / "all"),
        checkpoint=checkpoint,
        search=SearchConfig(k=4, grid=False, modality=Searched.text),
    )
    search.run(config, FreeText(query="a red square number 8"))
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].split() == ["rank", "score", "path", "caption", "collection"]
    assert [line.split()[-1] for line in lines[2:4]] == ["one", "other"]
    assert "a red square number 8" in lines[2]
