"""`twotower train`: train a variant on a data set."""

from twotower.config import Config, FreeText
from twotower.training.run import train


def run(config: Config, free: FreeText) -> None:
    """Train, or reuse the finished run."""
    train(config)
