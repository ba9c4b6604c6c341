"""`twotower index`: build and save an index of a store, or say what a saved one is."""

from twotower.config import Config, FreeText
from twotower.retrieval.indexing import index_store


def run(config: Config, free: FreeText) -> None:
    """Index the store of the run, or `store=`; with the word `show` describe a saved index."""
    index_store(config, free)
