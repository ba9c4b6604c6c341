"""`twotower search`: the nearest pictures to words or to a picture."""

from twotower.config import Config, FreeText
from twotower.retrieval.search.session import search_store


def run(config: Config, free: FreeText) -> None:
    """Search for `query=` or `query_image=`; without either, ask for queries."""
    search_store(config, free)
