"""Indexes in shards that are objects of this process; test_ray_cluster.py has real actors."""

from __future__ import annotations

import logging
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.retrieval import test_index as contract
from tests.retrieval.reference import brute_force
from twotower.config import IndexConfig, Metric
from twotower.embedding.store import EmbeddingStore
from twotower.engine_config import Engine
from twotower.hydra_app import compose
from twotower.retrieval import INDEXES
from twotower.retrieval.build import build_index
from twotower.retrieval.exact import ExactConfig, RowMemory
from twotower.retrieval.faiss_index import FaissConfig
from twotower.retrieval.index import AnyFloatArray
from twotower.retrieval.kept import open_index
from twotower.retrieval.ray import cluster as ray_cluster
from twotower.retrieval.ray import index as ray_index
from twotower.retrieval.ray.connection import connect
from twotower.retrieval.ray.index import RayIndex
from twotower.retrieval.ray.shard import Shard, Wanted
from twotower.retrieval.saved import load_index, save_index
from twotower.settings import ConfigError

EXACT = ExactConfig(engine=Engine.ray, shards=3)
CASES: dict[str, IndexConfig] = {
    "exact sharded": EXACT,
    "exact stored": ExactConfig(engine=Engine.ray, shards=2, memory=RowMemory.stored),
    "faiss sharded": FaissConfig(engine=Engine.ray, metric=Metric.ip),
    "IVF4,Flat": FaissConfig(engine=Engine.ray, factory="IVF4,Flat", nprobe=4),
    "HNSW16": FaissConfig(engine=Engine.ray, factory="HNSW16"),
}


class LocalShards:
    """Shards that are called in this process; `restart` makes one anew, as Ray does."""

    def __init__(self, config: IndexConfig, dim: int, folders: Sequence[Path]) -> None:
        self.about = (ray_cluster.in_this_process(config), dim)
        self.folders = folders
        self.shards = [Shard(*self.about, folder) for folder in folders]
        self.calls: list[str] = []

    def restart(self, number: int) -> None:
        self.shards[number] = Shard(*self.about, self.folders[number])

    def call(self, method: str, arguments: Sequence[Sequence[Any]], *, working: bool) -> list[Any]:
        self.calls.append(method)
        calls = zip(self.shards, arguments, strict=True)
        return [getattr(shard, method)(*args) for shard, args in calls]

    def tell(self, method: str, arguments: Sequence[Sequence[Any]]) -> None:
        self.call(method, arguments, working=True)

    def close(self) -> None:
        self.calls.append("close")


@pytest.fixture(autouse=True)
def in_this_process(
    monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory
) -> None:
    monkeypatch.setattr(ray_index, "Shards", LocalShards)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path_factory.mktemp("spool")))


def shards_of(index: Any) -> LocalShards:
    assert isinstance(index, RayIndex)
    shards: Any = index._shards
    return shards  # type: ignore[no-any-return]


def filled(config: IndexConfig = EXACT) -> tuple[Any, AnyFloatArray, AnyFloatArray]:
    rows, queries = contract.rows_and_queries()
    index = INDEXES.build(config, contract.DIM)
    index.add(rows)
    return index, rows, queries


CONTRACT = [
    contract.test_an_empty_index_answers_with_padding,
    contract.test_adds_searches_and_keeps_ids,
    contract.test_deletes_rows_and_keeps_the_ids_of_the_others,
    contract.test_pads_beyond_its_rows_and_takes_no_queries,
    contract.test_equal_scores_stand_in_order_of_id,
    contract.test_zero_rows_score_zero,
    contract.test_saved_and_loaded_it_answers_the_same,
    contract.test_refuses_what_it_cannot_answer,
]


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("check", CONTRACT)
def test_keeps_the_contract_of_every_index(
    check: Any, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(contract.CASES, name, CASES[name])
    if check is contract.test_equal_scores_stand_in_order_of_id and name not in contract.EXACT:
        name = "exact stored"
        monkeypatch.setitem(contract.CASES, name, CASES[name])
    for exact in ("exact sharded", "faiss sharded"):
        if exact not in contract.EXACT:
            monkeypatch.setattr(contract, "EXACT", [*contract.EXACT, exact])
    wants_folder = "tmp_path" in check.__code__.co_varnames[: check.__code__.co_argcount]
    check(name, tmp_path) if wants_folder else check(name)


def test_shards_are_of_one_size_and_ids_keep_their_shard() -> None:
    index, rows, _ = filled()
    assert [wanted.rows for wanted in index._wanted] == [30, 30, 30]
    index.delete(np.arange(30))  # the whole first shard
    index.add(rows[:10], np.arange(200, 210))
    assert [wanted.rows for wanted in index._wanted] == [10, 30, 30]
    index.add(rows[10:33])
    assert [wanted.rows for wanted in index._wanted] == [31, 31, 31]
    assert index.nbytes > 93 * 12 * 4


def test_a_restarted_shard_becomes_what_it_was(tmp_path: Path) -> None:
    index, rows, queries = filled()
    index.delete(np.array([3, 40, 77]))
    want = index.search(queries, 20)
    for number in range(3):
        shards_of(index).restart(number)
    np.testing.assert_array_equal(index.search(queries, 20).ids, want.ids)
    save_index(index, tmp_path)
    index.add(rows[:5] * 2)
    want = index.search(queries, 20)
    for number in range(3):
        # Not from the first rows: they are in the file that was written.
        (shards_of(index).folders[number] / "000000.rows.npy").unlink()
        shards_of(index).restart(number)
    np.testing.assert_array_equal(index.search(queries, 20).ids, want.ids)


def test_what_one_shard_refuses_none_has_done() -> None:
    index, rows, queries = filled()
    want = index.search(queries, 95)
    with pytest.raises(ConfigError, match="beyond 1e38"):
        index.add(np.full((9, 12), 3e38, np.float32), normalized=True)
    assert len(index) == 90
    np.testing.assert_array_equal(index.search(queries, 95).ids, want.ids)
    index.add(rows[:9])
    assert index.search(queries, 99).ids.max() == 98


def test_a_replica_that_did_what_was_taken_back_starts_anew() -> None:
    index, rows, queries = filled()
    bad = rows[:9] * 3
    bad[-1] = 3e38
    with pytest.raises(ConfigError, match="beyond 1e38"):
        index.add(bad, normalized=True)
    stale = shards_of(index).shards[0]  # it has done its part, and is not asked for a while
    shards_of(index).restart(0)
    index.add(rows[20:29] * 2)
    index.add(rows[40:49] * 2)
    want = index.search(queries, 108)
    shards_of(index).shards[0] = stale
    assert stale._done == 2 and index._wanted[0].operations == 3
    found = index.search(queries, 108)
    np.testing.assert_array_equal(found.ids, want.ids)
    np.testing.assert_array_equal(found.scores, want.scores)


def test_rows_of_a_store_are_read_from_its_files(store: EmbeddingStore) -> None:
    index = build_index(EXACT, store)
    local = build_index(ExactConfig(), store)
    queries = np.concatenate(store.text_shards()).astype(np.float32)
    np.testing.assert_array_equal(index.search(queries, 9).ids, local.search(queries, 9).ids)
    spool = shards_of(index).folders[0].parent
    assert not list(spool.glob("*/*.rows.npy"))
    assert list(spool.glob("*/*.ids.npy"))


def test_a_changed_file_is_refused(tmp_path: Path) -> None:
    rows, queries = contract.rows_and_queries()
    np.save(tmp_path / "rows.npy", rows)
    index = INDEXES.build(EXACT, contract.DIM)
    index.add(np.load(tmp_path / "rows.npy", mmap_mode="r")[5:])
    want = brute_force(contract.as_kept(EXACT, rows[5:]), np.arange(85), queries, 5, Metric.cosine)
    for _ in range(2):
        np.testing.assert_array_equal(index.search(queries, 5).ids, want.ids)
        shards_of(index).restart(1)
    np.save(tmp_path / "rows.npy", rows * 2)
    shards_of(index).restart(1)
    with pytest.raises(ConfigError, match="rows.npy, which has changed; build the index again"):
        index.search(queries, 5)
    (tmp_path / "rows.npy").unlink()
    with pytest.raises(ConfigError, match="rows.npy, which this node does not see: No such file"):
        index.search(queries, 5)


def test_a_shard_in_another_state_is_refused_and_a_lost_journal_told() -> None:
    index, _, queries = filled()
    shard, wanted = shards_of(index).shards[0], index._wanted[0]
    with pytest.raises(ConfigError, match="30 rows and fingerprint .* where 31 and"):
        shard.search(wanted._replace(rows=31), queries, 3)
    with pytest.raises(ConfigError, match="where 30 and abc are wanted; build the index again"):
        shard.search(Wanted(1, "abc", 30), queries, 3)
    folder = shards_of(index).folders[0]
    (folder / "000000.json").unlink()
    shards_of(index).restart(0)
    with pytest.raises(ConfigError, match="operation 0 of the shard .* is lost"):
        index.search(queries, 3)
    (folder.parent / "spool").unlink()
    with pytest.raises(ConfigError, match="the node .* does not see .* with index.spool="):
        index.search(queries, 3)


def test_an_answer_of_another_state_is_never_merged(monkeypatch: pytest.MonkeyPatch) -> None:
    index, _, queries = filled()
    search = Shard.search
    monkeypatch.setattr(Shard, "search", lambda *args: search(*args)._replace(rows=29))
    with pytest.raises(ray_cluster.Unavailable, match="in another state"):
        index.search(queries, 3)


def test_a_kept_index_is_one_of_its_shards(
    store: EmbeddingStore, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "store").symlink_to(store.folder)
    here = EmbeddingStore.open(tmp_path / "store")
    queries = np.concatenate(store.text_shards()).astype(np.float32)
    config = FaissConfig(engine=Engine.ray, factory="IVF2,Flat", nprobe=2)
    with caplog.at_level(logging.INFO):
        first = open_index(config, here).search(queries, 5)
        config.replicas = 2  # of no matter to what is kept
        again = open_index(config, here)
    assert "using the index" in caplog.text
    assert isinstance(again.config, IndexConfig) and again.config.replicas == 2
    np.testing.assert_array_equal(again.search(queries, 5).ids, first.ids)
    folder = tmp_path / "index" / "store-IVF2,Flat-ray2"
    before = sorted(path.name for path in folder.glob("*.bin"))
    assert len(before) == 3
    save_index(again, folder)
    after = sorted(path.name for path in folder.glob("*.bin"))
    assert len(after) == 3 and not set(before) & set(after)
    (folder / after[1]).unlink()
    with pytest.raises(ConfigError, match="damaged; build it again"):
        load_index(folder)


def test_ends_its_actors_and_its_files_when_it_is_dropped() -> None:
    index, _, _ = filled()
    shards = shards_of(index)
    spool = shards.folders[0].parent
    assert spool.is_dir()
    del index
    assert shards.calls[-1] == "close"
    assert not spool.exists()


def test_without_ray_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ConfigError, match=r"needs Ray, .* pip install 'twotower\[ray\]'"):
        connect("auto")


def test_settings_reach_the_index_and_are_refused_in_a_sentence(tmp_path: Path) -> None:
    chosen = ["index.engine=ray", "index.shards=4", f"index.spool={tmp_path}/spool"]
    config = compose(["index=faiss_sq8", *chosen]).index
    index: Any = INDEXES.build(config, 8)
    assert len(shards_of(index).folders) == 4
    assert shards_of(index).folders[0].parent.parent == tmp_path / "spool"
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="index.spool=.*file cannot be written"):
        INDEXES.build(ExactConfig(engine=Engine.ray, spool=str(tmp_path / "file")), 8)
    with pytest.raises(ConfigError, match="cannot be built"):
        INDEXES.build(FaissConfig(engine=Engine.ray, factory="Nonsense"), 8)
