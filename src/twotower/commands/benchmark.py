"""`twotower benchmark`: the exact index and FAISS indexes on the same rows and queries."""

from twotower.config import Config, FreeText
from twotower.retrieval.benchmark.run import benchmark


def run(config: Config, free: FreeText) -> None:
    """Measure the indexes of the benchmark section, print the tables, and write them with plots."""
    benchmark(config, free.compare or config.benchmark.compare)
