"""What `index=auto` is asked for: budgets, and the recall that text queries are to have."""

from __future__ import annotations

import enum
import os
from dataclasses import dataclass

from twotower.config import IndexConfig
from twotower.machine import free_bytes
from twotower.settings import setting

GB = 1e9


class Preference(enum.Enum):
    """What decides between indexes that meet the target and the budgets."""

    speed = "speed"
    memory = "memory"


@dataclass(kw_only=True)
class AutoConfig(IndexConfig):
    """The best of several indexes, by recall that is measured with text queries."""

    max_memory_gb: float = setting(
        0.0,
        "memory that the index may take, GB; 0 is half of this machine's, or what is free if that "
        "is less",
        ge=0,
    )
    max_latency_ms: float = setting(10.0, "median time that one query may take, ms", gt=0)
    target_recall: float = setting(
        0.95, "share of the exact best results that text queries are to find", gt=0, le=1
    )
    recall_k: int = setting(10, "results a query that recall is measured on", ge=1)
    num_queries: int = setting(
        1000, "queries of a kind, at most: half of them to tune on, half to measure with", ge=20
    )
    prefer: Preference = setting(
        Preference.speed, "of what meets target and budgets: the fastest, or the smallest"
    )
    candidates: list[str] = setting(
        [], "`exact` and FAISS factory strings to try; empty is what rows and memory suggest"
    )

    # What was chosen once is found by every search, whatever it asks for.
    not_of_the_rows = (
        *IndexConfig.not_of_the_rows,
        *("max_memory_gb", "max_latency_ms", "target_recall", "recall_k", "num_queries"),
        *("prefer", "candidates"),
    )

    @property
    def memory(self) -> float:
        """Bytes that the index may take; where none are given, by what is free at this moment."""
        if self.max_memory_gb:
            return self.max_memory_gb * GB
        half = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2
        free = free_bytes()
        return half if free is None else max(1, min(half, free))
