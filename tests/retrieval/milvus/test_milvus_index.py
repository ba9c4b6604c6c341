"""Milvus as an index, through milvus-lite; test_index.py has what every index must do."""

from __future__ import annotations

import gc
import logging
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.dataset as ds
import pytest

from tests.retrieval import test_index as contract
from tests.retrieval.reference import brute_force
from tests.retrieval.search import test_filter_grammar as grammar
from twotower.config import Metric
from twotower.embedding.store import EmbeddingStore
from twotower.engine_config import Engine
from twotower.retrieval import INDEXES
from twotower.retrieval.build import build_index
from twotower.retrieval.exact import ExactConfig
from twotower.retrieval.kept import open_index
from twotower.retrieval.milvus import index as milvus_index
from twotower.retrieval.milvus.collection import MilvusCollection, MilvusConfig, client_of
from twotower.retrieval.milvus.filters import field_kind, translate
from twotower.retrieval.milvus.index import MilvusIndex
from twotower.retrieval.milvus.store import filter_of, open_collection
from twotower.retrieval.saved import load_index, save_index
from twotower.retrieval.search.collection import Collection
from twotower.retrieval.search.filter_grammar import parse_filter
from twotower.settings import ConfigError


@pytest.fixture(scope="module")
def uri(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(tmp_path_factory.mktemp("milvus") / "vectors.db")


def filled(config: MilvusConfig) -> tuple[Any, Any, Any]:
    rows, queries = contract.rows_and_queries()
    index = INDEXES.build(config, contract.DIM)
    index.add(rows)
    return index, rows, queries


@pytest.mark.parametrize("metric", Metric)
@pytest.mark.parametrize("index_type", ["FLAT", "HNSW"])
def test_finds_what_brute_force_finds(metric: Metric, index_type: str) -> None:
    params = ["M=16", "efConstruction=100"] if index_type == "HNSW" else []
    config = MilvusConfig(metric=metric, index_type=index_type, build_params=params)
    config.search_params = ["ef=90"] if params else []
    config.batch_rows = 7
    index, rows, queries = filled(config)
    index.delete(np.arange(0, 90, 2))
    left = np.arange(1, 90, 2)
    want = brute_force(contract.as_kept(config, rows[left]), left, queries, 60, metric)
    found = index.search(queries, 60)
    np.testing.assert_array_equal(found.ids, want.ids)
    np.testing.assert_allclose(found.scores, want.scores, atol=1e-5)
    assert index.nbytes == 45 * (12 * 4 + 8)


def test_what_it_made_for_itself_ends_with_it_unless_it_was_saved(uri: str, tmp_path: Path) -> None:
    index, _, queries = filled(MilvusConfig(uri=uri))
    name = index.collection.name
    assert client_of(uri).has_collection(name)
    del index
    gc.collect()
    assert not client_of(uri).has_collection(name)
    index, _, queries = filled(MilvusConfig(uri=uri))
    save_index(index, tmp_path, "rows")
    name, found = index.collection.name, index.search(queries, 3)
    del index
    np.testing.assert_array_equal(load_index(tmp_path, "rows").search(queries, 3).ids, found.ids)
    client_of(uri).drop_collection(name)
    with pytest.raises(ConfigError, match=f"{name} at .* is not there any more; build it again"):
        load_index(tmp_path, "rows")


def test_a_collection_that_is_there_is_not_taken_for_a_new_one(uri: str) -> None:
    config = MilvusConfig(uri=uri, collection="mine")
    index, rows, _ = filled(config)
    other = INDEXES.build(config, contract.DIM)
    with pytest.raises(ConfigError, match="mine is there already; choose another"):
        other.add(rows)
    index.collection.drop()


def test_refuses_in_sentences(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    rows, queries = contract.rows_and_queries()
    index: Any = INDEXES.build(MilvusConfig(), contract.DIM)

    def refuse(*args: object, **kwargs: object) -> None:
        raise RuntimeError("no room\nnot here")

    with monkeypatch.context() as patch:
        patch.setattr(index.collection._client, "create_collection", refuse)
        with pytest.raises(ConfigError, match="^the Milvus collection .* cannot be made: no room$"):
            index.add(rows)
    assert len(index) == 0
    with pytest.raises(ConfigError, match="build_params takes name=number, .* not M:3"):
        INDEXES.build(MilvusConfig(build_params=["M:3"]), contract.DIM).add(rows)
    with pytest.raises(ConfigError, match="nowhere/deep/x.txt cannot be opened; one process at"):
        INDEXES.build(MilvusConfig(uri=str(tmp_path / "nowhere" / "deep" / "x.txt")), 3)
    with pytest.raises(ConfigError, match="index.engine=ray goes with index=exact or faiss"):
        INDEXES.build(MilvusConfig(engine=Engine.ray), 3)
    found, _, queries = filled(MilvusConfig())
    monkeypatch.setattr(milvus_index, "PAGE", 50)
    with pytest.raises(ConfigError, match="at most 50 results a query, not 60"):
        found.search(queries, 60)
    monkeypatch.setitem(sys.modules, "milvus_lite", None)
    client_of.cache_clear()
    with pytest.raises(ConfigError, match=r"milvus_lite, .* pip install 'twotower\[milvus\]'"):
        INDEXES.build(MilvusConfig(), 3)


def test_says_that_milvus_lite_is_slow(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(milvus_index, "SLOW_ROWS", 80)
    index, rows, _ = filled(MilvusConfig())
    assert "with 90 rows a query takes long" in caplog.text
    caplog.clear()
    monkeypatch.setattr(index.collection, "uri", "http://server:19530")
    index.warn_of_size(91)
    assert not caplog.text


def test_a_store_is_loaded_once_and_continued_where_it_was_killed(
    store: EmbeddingStore,
    uri: str,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    config = MilvusConfig(uri=uri, batch_rows=4, columns=["image_id", "source_row"])
    insert = MilvusCollection.insert
    done: list[list[int]] = []

    def killed(self: MilvusCollection, rows: Any, ids: Any, fields: Any = ()) -> None:
        if len(done) == 3:
            raise KeyboardInterrupt
        done.append(ids.tolist())
        insert(self, rows, ids, fields)

    with monkeypatch.context() as patch:
        patch.setattr(MilvusCollection, "insert", killed)
        with pytest.raises(KeyboardInterrupt):
            open_index(config, store)
    with caplog.at_level(logging.INFO):
        index = open_index(config, store)
        assert f"loading {len(store) - 12} of {len(store)} rows into Milvus" in caplog.text
        caplog.clear()
        index = open_index(config, store)
        assert "loading" not in caplog.text
    assert isinstance(index, MilvusIndex) and len(index) == len(store)
    exact = build_index(ExactConfig(), store)
    queries = np.concatenate(store.text_shards()).astype(np.float32)
    np.testing.assert_array_equal(index.search(queries, 5).ids, exact.search(queries, 5).ids)

    # What Milvus filters is what pyarrow does.
    collection = Collection(store, exact)
    for text in (
        "source_row>=20 or source_row<2",
        'image_id in ["id3", "id5"]',
        "image_id is null",
    ):
        ids = collection.passing(text)
        found = index.search(queries, len(store), where=filter_of(index, store, text))
        assert {*found.ids.ravel().tolist()} == {*ids.tolist(), -1}
    with pytest.raises(ConfigError, match=r"names split, which is no field .*row,split\]"):
        filter_of(index, store, 'split == "train"')

    index.collection.insert(np.ones((1, index.dim), np.float32), np.array([10_000]), [{}])
    with pytest.raises(ConfigError, match="holds rows that the store .* does not have"):
        open_collection(config, store)


def test_a_collection_that_was_killed_before_its_index_is_continued(
    store: EmbeddingStore, uri: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    params = ["M=16", "efConstruction=100"]
    config = MilvusConfig(uri=uri, collection="bare", index_type="HNSW", build_params=params)
    client = client_of(uri)

    def killed(*args: object, **kwargs: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(client, "create_index", killed)
        with pytest.raises(KeyboardInterrupt):
            open_collection(config, store)
    assert client.has_collection("bare") and not client.list_indexes("bare")
    index = open_collection(config, store)
    about = client.describe_index("bare", index_name=client.list_indexes("bare")[0])
    assert about["index_type"] == "HNSW"
    queries = np.concatenate(store.text_shards()).astype(np.float32)
    want = build_index(ExactConfig(), store).search(queries, 5)
    np.testing.assert_array_equal(index.search(queries, 5).ids, want.ids)


def test_a_collection_of_other_rows_is_refused(store: EmbeddingStore, uri: str) -> None:
    config = MilvusConfig(uri=uri, collection="named")
    assert len(open_collection(config, store)) == len(store)
    config.metric = Metric.ip
    with pytest.raises(ConfigError, match="named was made from other rows or with other settings"):
        open_collection(config, store)
    with pytest.raises(ConfigError, match="columns names depth, but the store .* has image_path"):
        open_collection(MilvusConfig(uri=uri, columns=["depth"]), store)


@pytest.fixture(scope="module")
def filtered(uri: str) -> MilvusCollection:
    """A collection with the rows that the grammar is tested on."""
    fields = {name: grammar.TABLE.schema.field(name).type for name in FIELDS}
    config = MilvusConfig(uri=uri, collection="filtered", columns=list(fields))
    index = MilvusIndex(config, 2)
    kinds = {name: field_kind(name, kind) for name, kind in fields.items()}
    index.create(kinds, "", kept=True)
    rows = np.ones((grammar.COUNT, 2), np.float32)
    columns = grammar.TABLE.select(list(fields)).to_pylist()
    index.collection.insert(rows, np.arange(grammar.COUNT), columns)
    return index.collection


FIELDS = ["width", "class", "ok"]
NATIVE = [
    'not (class in ["cat"] or width > 500)',
    "class is null or width is not null",
    "ok == false and not width < 300",
    "600 > width",
]


@pytest.mark.parametrize("text", [*grammar.CASES, *NATIVE])
def test_milvus_passes_the_rows_that_pyarrow_passes(filtered: MilvusCollection, text: str) -> None:
    try:
        expression = translate(text, grammar.TABLE.schema, FIELDS)
    except ConfigError:
        assert text not in NATIVE
        return
    wanted = ds.dataset(grammar.TABLE).scanner(
        columns={"passes": parse_filter(text, grammar.TABLE.schema).expression}
    )
    passes = wanted.to_table()["passes"].fill_null(False).to_numpy()
    found = filtered.search(np.ones((1, 2), np.float32), grammar.COUNT, expression)[0]
    assert sorted(hit["row_id"] for hit in found) == np.flatnonzero(passes).tolist()


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('class contains "dog"', "contains, which ignores case; Milvus cannot"),
        ("meta.iso > 3", "meta.iso, a part of a nested column"),
        ('when > "2024-01-05"', "has a date or time"),
        ("width > `my column`", "Milvus compares a column with a constant"),
        ("`my column` > 3", "my column, which is no field"),
        ("nothing == 3", "nothing has not a single value"),
        ("width >=", "cannot read the filter at its end"),
        (" ", "the filter is empty"),
    ],
)
def test_what_milvus_does_not_evaluate_is_refused(text: str, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        translate(text, grammar.TABLE.schema, FIELDS)


@pytest.mark.parametrize(
    ("name", "kind", "words"),
    [
        ("my column", pa.int64(), "cannot be the name of a Milvus field"),
        ("vector", pa.int64(), "cannot be the name"),
        ("when", pa.date32(), r"holds date32\[day\]; a Milvus field takes numbers"),
    ],
)
def test_a_column_that_is_no_field_is_refused(name: str, kind: pa.DataType, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        field_kind(name, kind)


def test_the_manifest_holds_no_secret(
    uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MILVUS_TOKEN", "root:Sesame")
    index, _, _ = filled(MilvusConfig(uri=uri))
    save_index(index, tmp_path)
    for file in tmp_path.iterdir():
        assert "Sesame" not in file.read_text()
