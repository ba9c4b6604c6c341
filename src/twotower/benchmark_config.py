"""The section of the config that says what `twotower benchmark` measures, and for how long."""

from __future__ import annotations

import enum
from dataclasses import dataclass
from typing import Any, ClassVar

from twotower.settings import ConfigError, Section, setting


class QueryKind(enum.Enum):
    """Which queries are timed; `auto` takes texts where there are any."""

    auto = "auto"
    text = "text"
    image = "image"


@dataclass(kw_only=True)
class BenchmarkConfig(Section):
    """Indexes compared on the same queries."""

    section: ClassVar[str] = "benchmark"

    indexes: list[str] = setting(
        ["exact", "Flat", "IVF64,Flat", "HNSW32", "SQ8"],
        "`exact`, `exact:torch` (a tier of it), and FAISS factory strings; Flat is measured as it "
        "is and tuned",
    )
    saved: list[str] = setting(
        [],
        "folders of indexes of the store that `twotower index` saved: each is opened and measured "
        "as a search would use it",
    )
    nprobe: list[int] = setting([1, 4, 16, 64], "values tried of each IVF index, a curve", ge=1)
    ef_search: list[int] = setting([16, 64, 256], "values tried of each HNSW index, a curve", ge=1)
    queries: list[int] = setting([1, 16, 256], "batch sizes: queries a call", ge=1)
    k: Any = setting(10, "results a query, or several numbers of them, as in [1,10,100]", ge=1)
    timed: QueryKind = setting(QueryKind.auto, "queries that are timed; auto is text if there is")
    recall_queries: int = setting(
        1000, "queries of a kind, at most, behind the recall, text and image apart", ge=1
    )
    rows: int = setting(0, "synthetic CLIP-like rows instead of a store; 0 is a store", ge=0)
    dim: int = setting(512, "their dimension", ge=1)
    rounds: int = setting(5, "timed rounds, at most, the indexes alternating", ge=1)
    max_seconds: float = setting(
        60.0, "seconds of timing, about: what does not fit is cut, and said; 0 cuts nothing", ge=0
    )
    compare: str = setting("", "an earlier benchmark.jsonl: what has become slower is marked")
    fail_below: float = setting(
        0.0,
        "with compare: fail if a marked speed is below this share of the old, or one of its "
        "rows is not measured; 0 never",
        ge=0,
    )
    output: str = setting(
        "", "folder of the tables and the plots; by default logs/<run.name>/benchmark"
    )

    def __post_init__(self) -> None:
        values = self.k if isinstance(self.k, list) else [self.k]
        if not all(isinstance(k, int) and not isinstance(k, bool) for k in values):
            raise ConfigError(
                f"benchmark.k must be a whole number, or a list of them, not {self.k}"
            )
        super().__post_init__()
        examples = {"indexes": "[exact,HNSW32]", "queries": "[1,16]", "k": "[10,100]"}
        for name, example in examples.items():
            if getattr(self, name) == []:
                raise ConfigError(
                    f"benchmark.{name} is empty; give at least one, as in {name}={example}"
                )

    @property
    def k_values(self) -> list[int]:
        """Each number of results once, ascending."""
        return sorted(set(self.k if isinstance(self.k, list) else [self.k]))
