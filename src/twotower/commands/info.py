"""`twotower info`: the machine, the versions and what is available."""

from __future__ import annotations

from pathlib import Path

from twotower.config import Config, FreeText
from twotower.console import say
from twotower.machine import describe, table
from twotower.retrieval.scan import tiers


def run(config: Config, free: FreeText) -> None:
    """Print what this machine offers, as aligned text on stdout."""
    rows = describe(Path(config.run.models_dir))
    place = [name for name, _ in rows].index("faiss") + 1
    rows.insert(place, ("exact search", tiers.describe()))
    say(table(rows))
