"""`twotower info`: the machine, the versions and what is available."""

from __future__ import annotations

from pathlib import Path

from twotower.config import Config, FreeText
from twotower.console import say
from twotower.machine import describe, table


def run(config: Config, free: FreeText) -> None:
    """Print what this machine offers, as aligned text on stdout."""
    say(table(describe(Path(config.run.models_dir))))
