"""Search settings of a built index, each as small as the recall allows."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

from twotower.retrieval.auto.measure import smallest
from twotower.retrieval.faiss_index import FaissConfig, FaissIndex
from twotower.retrieval.index import VectorIndex
from twotower.retrieval.rerank import RerankedIndex

MOST = {"ef_search": 4096, "nprobe": 4096, "rerank": 256, "k_factor": 256}
FIRST = {"ef_search": 64, "nprobe": 256}  # while the other one is tuned


def tune(
    index: VectorIndex, knobs: tuple[str, ...], recall: Callable[[], float], target: float
) -> dict[str, int]:
    """Set each knob of an index to the smallest value with which it reaches a recall.

    Where there are two, each may lose half of what the target allows to be lost: first how many
    candidates are looked at again, while many cells are visited, then the cells. A knob with which
    no value reaches it is set to its largest.

    Args:
        recall: measures the index as it is set now.

    Returns:
        The values, which are set.
    """
    if not knobs:
        return {}
    found = {name: min(FIRST.get(name, MOST[name]), most(index, name)) for name in knobs}
    _set(index, found)
    allowed = 1 - target
    for place, name in enumerate(knobs):
        goal = 1 - allowed * (place + 1) / len(knobs)

        def reaches(value: int, name: str = name, goal: float = goal) -> bool:
            _set(index, {name: value})
            return recall() >= goal

        found[name] = smallest(reaches, most(index, name)) or most(index, name)
        _set(index, {name: found[name]})
    return found


def most(index: VectorIndex, name: str) -> int:
    """The largest value of a knob that is tried; of nprobe no more than there are cells."""
    config = index.config
    assert isinstance(config, FaissConfig)
    cells = re.search(r"IVF(\d+)", config.factory)
    return min(MOST[name], int(cells[1])) if name == "nprobe" and cells else MOST[name]


def _set(index: VectorIndex, settings: dict[str, Any]) -> None:
    assert isinstance(index, FaissIndex | RerankedIndex)
    index.search_with(**settings)
