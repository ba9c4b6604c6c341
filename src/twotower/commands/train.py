"""`twotower train`: train a variant on a data set."""

from twotower.config import Config, FreeText
from twotower.training.run import train


def run(config: Config, free: FreeText) -> float | None:
    """Train, or reuse the finished run; its best watched metric, for sweeps that maximise it."""
    return train(config)
