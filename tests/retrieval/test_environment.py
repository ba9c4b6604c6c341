from __future__ import annotations

from pathlib import Path

import faiss
import torch

import twotower.retrieval
from twotower.retrieval.environment import environment


def test_faiss_gets_as_many_threads_as_torch() -> None:
    before = faiss.omp_get_max_threads()
    try:
        faiss.omp_set_num_threads(torch.get_num_threads() + 1)
        about = environment()
        assert faiss.omp_get_max_threads() == torch.get_num_threads()
        assert about["faiss_threads"] == about["torch_threads"] == torch.get_num_threads()
    finally:
        faiss.omp_set_num_threads(before)


def test_indexes_do_without_the_benchmark() -> None:
    # The benchmark imports them: the other way round would be a circle.
    modules = list(Path(twotower.retrieval.__path__[0]).glob("*.py"))
    assert len(modules) > 10
    text = "import twotower.retrieval.benchmark", "from twotower.retrieval.benchmark"
    assert not [file.name for file in modules if any(each in file.read_text() for each in text)]
