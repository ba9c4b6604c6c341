"""`twotower compare`: the measurements of all runs in one table."""

from twotower.config import Config, FreeText
from twotower.report.compare import compare


def run(config: Config, free: FreeText) -> None:
    """Print which variant wins."""
    compare(config)
