"""Indexes on a Ray cluster of three nodes, one of which is killed while it is searched."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.retrieval.reference import brute_force
from twotower.config import IndexConfig
from twotower.engine_config import Engine
from twotower.retrieval import INDEXES
from twotower.retrieval.exact import ExactConfig
from twotower.retrieval.faiss_index import FaissConfig
from twotower.retrieval.index import AnyFloatArray, unit_rows
from twotower.retrieval.ray.cluster import Unavailable
from twotower.retrieval.saved import load_index, save_index
from twotower.settings import ConfigError

pytestmark = pytest.mark.slow

DIM, COUNT, NODES = 24, 4000, 3


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    """A head that takes no actors, and three nodes that do."""
    import ray
    from ray.cluster_utils import Cluster

    patch = pytest.MonkeyPatch()
    # A raylet waits so long for its helpers, which a busy machine starts slowly.
    patch.setenv("RAY_raylet_start_wait_time_s", "120")
    small = {"object_store_memory": 80 * 2**20, "include_dashboard": False}
    quick = {"health_check_period_ms": 500, "health_check_failure_threshold": 4}
    made = Cluster(
        initialize_head=True, head_node_args={"num_cpus": 0, **small, "_system_config": quick}
    )
    for _ in range(NODES):
        made.add_node(num_cpus=8, **small)
    ray.init(address=made.address, log_to_driver=False, logging_level="ERROR")
    yield made
    ray.shutdown()
    made.shutdown()
    patch.undo()


def on_ray(replicas: int = 1, patience: float = 90) -> ExactConfig:
    return ExactConfig(
        engine=Engine.ray, shards=3, replicas=replicas, shard_cpus=0.5, patience=patience
    )


def made_on(config: IndexConfig) -> tuple[Any, AnyFloatArray, AnyFloatArray]:
    rng = np.random.default_rng(0)
    rows = rng.standard_normal((COUNT, DIM)).astype(np.float32)
    index = INDEXES.build(config, DIM)
    index.add(rows)
    return index, rows, rng.standard_normal((50, DIM)).astype(np.float32)


def nodes_of(index: Any) -> list[list[str]]:
    """On which node each replica of each shard is, once all of them are there."""
    import ray

    def here(shard: Any) -> str:
        return str(ray.get_runtime_context().get_node_id())

    deadline = time.monotonic() + 120
    while True:
        try:
            return [
                ray.get([replica.actor.__ray_call__.remote(here) for replica in replicas])
                for replicas in index._shards._replicas
            ]
        except ray.exceptions.RayActorError:
            assert time.monotonic() < deadline
            time.sleep(1)


def test_adds_deletes_saves_and_loads(cluster: Any, tmp_path: Path) -> None:
    index, rows, queries = made_on(on_ray())
    index.delete(np.arange(0, COUNT, 3))
    there = np.flatnonzero(np.arange(COUNT) % 3)
    want = brute_force(unit_rows(rows[there]), there, queries, 10, index.config.metric)
    np.testing.assert_array_equal(index.search(queries, 10).ids, want.ids)
    save_index(index, tmp_path, "rows")
    with pytest.raises(ConfigError, match="was built from other rows"):
        load_index(tmp_path, "others")
    loaded = load_index(tmp_path, "rows")
    np.testing.assert_array_equal(loaded.search(queries, 10).ids, want.ids)
    assert (loaded.search(queries, COUNT).ids[:, len(there) :] == -1).all()
    with pytest.raises(ConfigError, match="row id 1 is taken"):
        loaded.add(rows[:1], np.array([1]))
    with pytest.raises(ConfigError, match="beyond 1e38"):
        loaded.add(np.full((9, DIM), 3e38, np.float32), normalized=True)
    np.testing.assert_array_equal(loaded.search(queries, 10).ids, want.ids)


def test_shards_of_faiss(cluster: Any) -> None:
    config = FaissConfig(
        engine=Engine.ray, factory="IVF8,Flat", nprobe=8, shards=2, shard_cpus=0.5, patience=90
    )
    index, rows, queries = made_on(config)
    want = brute_force(unit_rows(rows), np.arange(COUNT), queries, 10, index.config.metric)
    np.testing.assert_array_equal(index.search(queries, 10).ids, want.ids)


def test_what_no_node_has_room_for_is_refused(cluster: Any) -> None:
    with pytest.raises(Unavailable, match="index.replicas=9 must be different ones"):
        INDEXES.build(on_ray(replicas=9, patience=5), DIM)


@pytest.mark.parametrize("replicas", [2, 1])
def test_a_node_is_killed_during_a_thousand_queries(cluster: Any, replicas: int) -> None:
    index, rows, queries = made_on(on_ray(replicas))
    want = brute_force(unit_rows(rows), np.arange(COUNT), queries, 10, index.config.metric)
    nodes = nodes_of(index)
    for of_shard in nodes:
        assert len(set(of_shard)) == replicas
    victim = next(node for node in cluster.worker_nodes if node.node_id == nodes[0][0])
    refused = 0
    for number in range(1000):
        if number == 300:
            cluster.remove_node(victim, allow_graceful=False)
        one = number % 50
        try:
            found = index.search(queries[one : one + 1], 10)
        except Unavailable:
            refused += 1
            continue
        np.testing.assert_array_equal(found.ids[0], want.ids[one])
    assert not refused, "the nodes that are left have room"
    for of_shard in nodes_of(index):  # all replicas are back
        assert len(set(of_shard)) == replicas
        assert victim.node_id not in of_shard
    cluster.add_node(num_cpus=8, object_store_memory=80 * 2**20)
    index.add(rows[:30] * 2)
    assert len(index) == COUNT + 30
    assert index.search(queries, 10).ids.max() < COUNT + 30


def test_rows_that_no_file_holds_outlive_every_actor(cluster: Any) -> None:
    import ray

    index, rows, queries = made_on(on_ray())
    want = index.search(queries, 10)
    for replicas in index._shards._replicas:
        ray.kill(replicas[0].actor, no_restart=False)
    np.testing.assert_array_equal(index.search(queries, 10).ids, want.ids)
    for replicas in index._shards._replicas:
        ray.kill(replicas[0].actor)  # Ray gives it up
    np.testing.assert_array_equal(index.search(queries, 10).ids, want.ids)
