"""Lay out and count a data set (data=...), or the pretrained backbones (`prepare backbones`)."""

from __future__ import annotations

from pathlib import Path

from twotower.config import Config, FreeText
from twotower.console import say
from twotower.data.pairs import prepare_pairs
from twotower.data.summary import summary
from twotower.settings import ConfigError


def run(config: Config, free: FreeText) -> None:
    """Prepare what the verb names: nothing for the data set of `data=`, or `backbones`."""
    if free.verb is None:
        say(summary(prepare_pairs(config.data)))
    elif free.verb == "backbones":
        from twotower.models.backbones import prepare_backbones

        folder = Path(config.run.models_dir) / "pretrained"
        prepare_backbones(folder)
        say(f"backbones: in {folder}")
    else:
        raise ConfigError(
            f"prepare does not know {free.verb!r}; it prepares a data set (data=...) or backbones"
        )
