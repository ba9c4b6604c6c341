"""`twotower evaluate`: measure a checkpoint's retrieval."""

from twotower.config import Config, FreeText
from twotower.evaluation.report import evaluate


def run(config: Config, free: FreeText) -> None:
    """Measure retrieval on a split."""
    evaluate(config)
