from __future__ import annotations

import numpy as np
import pytest
import torch

from tests.retrieval.benchmark.helpers import ArrayData, section, some_rows
from twotower.retrieval.benchmark import contenders
from twotower.retrieval.benchmark.building import build
from twotower.retrieval.benchmark.contenders import (
    Cell,
    TunedFlat,
    cells_text,
    contenders_of,
    faiss_set,
    faiss_threshold,
    flat_settings,
    label,
    search_parameter,
)
from twotower.retrieval.faiss_index import FaissConfig, import_faiss


def test_an_index_takes_part_at_each_value_of_its_search_parameter() -> None:
    config = section(nprobe=[1, 4, 64, 99], ef_search=[32, 16])
    assert search_parameter("IVF8,Flat", config) == ("nprobe", [1, 4, 8])
    assert search_parameter("OPQ16,IVF64_HNSW32,PQ16", config) == ("nprobe", [1, 4, 64])
    assert search_parameter("IVF65k,SQ8", config) == ("nprobe", [1, 4, 64, 99])
    assert search_parameter("HNSW32,Flat", config) == ("efSearch", [16, 32])
    assert search_parameter("SQ8", config) == ("", [])
    data = ArrayData(some_rows(60))
    built = build(FaissConfig(factory="IVF8,Flat"), data, seed=1)
    group = contenders_of("IVF8,Flat", built.index, config)
    assert [label(one) for one in group] == [f"IVF8,Flat nprobe={value}" for value in (1, 4, 8)]
    queries = some_rows(9, seed=1)
    for one, value in zip(group, (1, 4, 8), strict=True):
        alone = build(FaissConfig(factory="IVF8,Flat", nprobe=value), data, seed=1).index
        with one.ready(Cell(9, 5)):
            found = one.index.search(queries, 5)
        np.testing.assert_array_equal(found.ids, alone.search(queries, 5).ids)
    assert [label(one) for one in contenders_of("Flat", built.index, config)] == [
        "Flat",
        "Flat tuned",
    ]
    assert len(contenders_of("IVF8,Flat", built.index, section(nprobe=[]))) == 1


def test_tuned_flat_tries_threads_and_both_paths_and_puts_faiss_back() -> None:
    faiss = import_faiss()
    usual, before = faiss_threshold(), torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        assert flat_settings(Cell(1, 5), 16) == [
            *((1, usual), (1, 1), (2, usual), (2, 1), (3, usual), (3, 1))
        ]
        assert flat_settings(Cell(10_000, 5), 16) == [(3, usual)]
    finally:
        torch.set_num_threads(before)
    threads = faiss.omp_get_max_threads()
    index = build(FaissConfig(), ArrayData(some_rows(60)), seed=1).index
    tuned = TunedFlat("Flat", index)
    cell = Cell(4, 5)
    assert tuned.chosen(cell) == ""
    tuned.prepare(cell, some_rows(4, seed=1))
    assert "BLAS threshold" in tuned.chosen(cell)
    tuned._best[cell] = (2, 7)
    with tuned.ready(cell):
        assert (faiss.omp_get_max_threads(), faiss_threshold()) == (2, 7)
    with pytest.raises(ZeroDivisionError), faiss_set(2, 7):
        _ = 1 / 0
    assert (faiss.omp_get_max_threads(), faiss_threshold()) == (threads, usual)


def test_the_fastest_setting_by_its_median_wins(monkeypatch: pytest.MonkeyPatch) -> None:
    settings = [(1, 1), (2, 1), (3, 1)]
    monkeypatch.setattr(contenders, "flat_settings", lambda *_: settings)
    index = build(FaissConfig(), ArrayData(some_rows(9)), seed=1).index
    took = iter([0.02, 0.03, 0.01, 0.02, 0.03, 0.09, 0.02, 0.01, 0.08])
    clock = iter(moment for seconds in took for moment in (0.0, seconds))
    monkeypatch.setattr(contenders.time, "perf_counter", lambda: next(clock))
    tuned = TunedFlat("Flat", index)
    tuned.prepare(Cell(1, 5), some_rows(1))
    assert tuned._best[Cell(1, 5)] == (1, 1)


def test_cells_in_few_words() -> None:
    assert (
        cells_text([Cell(16, 5), Cell(1, 5), Cell(1, 10), Cell(4, 5)]) == "Q=1 k=5,10; Q=4,16 k=5"
    )
