from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import twotower.conf

from twotower.hydra_app import compose
from twotower.retrieval.build import build_index

NAMES = sorted(path.stem for path in (Path(twotower.conf.__path__[0]) / "index").glob("*.yaml"))


@pytest.mark.parametrize("name", NAMES)
def test_every_index_of_the_config_is_built_and_finds_a_row(name: str) -> None:
    rows = np.random.default_rng(0).standard_normal((300, 8)).astype(np.float32)
    index = build_index(compose([f"index={name}"]).index, rows)
    assert index.search(rows[:20], 1).ids[:, 0].tolist() == list(range(20))


def test_a_factory_string_with_a_comma_reaches_faiss() -> None:
    config = compose(["index=faiss", 'index.factory="IVF4,Flat"', "index.nprobe=4"]).index
    assert (config.factory, config.nprobe) == ("IVF4,Flat", 4)  # type: ignore[attr-defined]


def test_the_benchmarks_of_the_config() -> None:
    full = compose(["benchmark=full"]).benchmark
    assert full.queries == [1, 4, 16, 64, 256, 1024, 4096]
    assert full.k_values == [1, 10, 100]
    quick = compose(["benchmark=quick", "benchmark.k=7", "benchmark.queries=[3]"]).benchmark
    assert (quick.indexes, quick.queries, quick.k_values) == (["exact", "Flat"], [3], [7])
    assert compose(["benchmark.k=[1,10]"]).benchmark.k_values == [1, 10]
