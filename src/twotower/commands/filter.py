"""`twotower filter`: the best pictures of a query, copied into a folder or listed in a file."""

from twotower.config import Config, FreeText
from twotower.retrieval.search.picking import pick


def run(config: Config, free: FreeText) -> None:
    """Copy or list what `query=` or `query_image=` finds, to `output=`."""
    pick(config, free)
