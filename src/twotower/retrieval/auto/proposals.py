"""Which indexes are worth trying for so many rows and so much memory: the rule of `index=auto`.

After autofaiss 2.18 (`external/optimize.py`) and FAISS's guidelines (github.com/facebookresearch/
faiss/wiki/Guidelines-to-choose-an-index), with the certified exact scan for their flat index:

- below 20,000 rows, exact: a scan takes some 0.2 ms (11 ms a million rows of 512 values on two
  cores), so there is nothing to gain;
- HNSW32, or with fewer links down to 8, where 4 (d + 2 M) bytes a row fit;
- cells by k-means, as many as the power of two nearest to 4 sqrt(N) below a million rows, 16,384
  below ten million, 65,536 below 300 million, 131,072 beyond; from 1,000 cells on a graph finds
  them;
- in the cells whole rows or bytes (SQ8) where they fit, and always codes: OPQ with PQ of the most
  bytes up to 64 that fit, and RaBitQ, a bit a value. The rows of the store re-rank what codes find.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

from twotower.config import IndexConfig, Metric
from twotower.retrieval.exact import ExactConfig, RowMemory
from twotower.retrieval.faiss_index import FaissConfig

FEW_ROWS = 20_000
MANY_CELLS = 1000  # from here on the cells are found by a graph
ROWS_A_CELL = 64  # to train on; FAISS wants 39 to 256
ID_BYTES = 8
REFINED = {"Refine(SQ8)": 1, "Refine(SQfp16)": 2}  # bytes a value; of all others 4
PQ_BYTES = (64, 48, 32, 24, 16, 8, 4)


@dataclass(frozen=True)
class Proposal:
    """An index that may be tried.

    Attributes:
        name: `exact` or a FAISS factory string.
        bytes_per_vector: estimated, in memory.
        knobs: settings of the search that trade speed for recall, in the order to tune them.
    """

    name: str
    config: IndexConfig
    bytes_per_vector: float
    knobs: tuple[str, ...] = ()


def propose(rows: int, dim: int, memory: float, metric: Metric) -> list[Proposal]:
    """The indexes to try for N rows of `dim` values, those that are likely too large with them.

    Args:
        memory: bytes that the index may take; rows and codes are fitted to it.
    """
    exact = exact_for(rows, dim, memory, metric)
    if rows < FEW_ROWS:
        return [exact]
    cells = num_cells(rows)
    finder = f"IVF{cells}_HNSW32" if cells >= MANY_CELLS else f"IVF{cells}"
    links = min(32, int(memory / (8 * rows) - dim / 2))
    names = [
        "SQ8",
        f"HNSW{max(links, 8)}",
        f"{finder},Flat",
        f"{finder},SQ8",
        f"{_opq(rows, dim, memory, finder)}",
        f"{finder},RaBitQ",
    ]
    return [exact, *(of_factory(name, rows, dim, metric) for name in names)]


def of_factory(factory: str, rows: int, dim: int, metric: Metric) -> Proposal:
    """The proposal of one FAISS factory string."""
    cells = re.search(r"IVF(\d+)", factory)
    sample = max(FaissConfig().sample_rows, ROWS_A_CELL * int(cells[1]) if cells else 0)
    config = FaissConfig(factory=factory, metric=metric, sample_rows=sample)
    return Proposal(factory, config, _bytes_of(factory, rows, dim), _knobs(factory))


def exact_for(rows: int, dim: int, memory: float, metric: Metric) -> Proposal:
    """The exact index: rows in memory as fp32 if they fit, else mapped from the store."""
    codes = dim + 24.0  # int8, with scale, norms, bounds and id
    fits = rows * (codes + 4 * dim) <= memory
    kept = RowMemory.fp32 if fits else RowMemory.stored
    return Proposal(
        "exact", ExactConfig(metric=metric, memory=kept), codes + (4 * dim if fits else 0)
    )


def num_cells(rows: int) -> int:
    """How many cells k-means makes."""
    if rows < 1_000_000:
        return int(2 ** round(math.log2(4 * math.sqrt(rows))))
    if rows < 10_000_000:
        return 16_384
    return 65_536 if rows < 300_000_000 else 131_072


def _opq(rows: int, dim: int, memory: float, finder: str) -> str:
    """OPQ with PQ of as many bytes as fit; the rotation leaves at most 7 values a byte."""
    usable = [size for size in PQ_BYTES if size <= dim]
    size = next((size for size in usable if rows * (size + ID_BYTES) <= memory), usable[-1])
    return f"OPQ{size}_{min(dim // size, 7) * size},{finder},PQ{size}x8"


def _bytes_of(factory: str, rows: int, dim: int) -> float:
    """Estimated bytes a vector; centroids are shared out over the rows."""
    cells = re.search(r"IVF(\d+)", factory)
    links = re.search(r"^HNSW(\d+)", factory)
    product = re.search(r"(?<!O)PQ(\d+)(?:x(\d+))?", factory)
    refined = re.search(r",(RFlat|Refine\(\w+\))", factory)
    if "RaBitQ" in factory:
        code = dim / 8 + 8
    elif product:
        code = int(product[1]) * int(product[2] or 8) / 8
    else:
        code = dim if "SQ8" in factory else 4 * dim
    shared = int(cells[1]) * (4 * dim + (64 * 4 if "_HNSW" in factory else 0)) if cells else 0
    graph = 8 * int(links[1]) if links else 0
    again = REFINED.get(refined[1], 4) * dim if refined else 0
    return code + ID_BYTES + graph + again + shared / max(rows, 1)


def _knobs(factory: str) -> tuple[str, ...]:
    """What may be tuned: how much is looked at again first, then how much is visited."""
    found = []
    if re.search(r"RFlat|Refine", factory):
        found.append("k_factor")
    elif re.search(r"PQ|SQ|RaBitQ|PCA|LSQ|RQ", factory):
        found.append("rerank")
    if "IVF" in factory:
        found.append("nprobe")
    elif re.search("HNSW|NSG", factory):
        found.append("ef_search")
    return tuple(found)
