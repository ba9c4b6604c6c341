"""`twotower classify`: pictures labelled with the nearest words of a vocabulary."""

from twotower.config import Config, FreeText
from twotower.retrieval.search.classify import classify


def run(config: Config, free: FreeText) -> None:
    """Label the picture or folder of `path=`, or without it the pictures of the store."""
    classify(config, free)
