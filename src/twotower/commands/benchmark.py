"""`twotower benchmark`: the exact index and FAISS indexes on the same store and queries."""

from twotower.config import Config, FreeText
from twotower.retrieval.benchmark import benchmark_store


def run(config: Config, free: FreeText) -> None:
    """Measure the indexes of the benchmark section, print the table, and write it with a plot."""
    benchmark_store(config)
