"""`twotower doctor`: a data set -> what is wrong with it, and a cleaned manifest."""

from __future__ import annotations

from twotower.config import Config, FreeText
from twotower.console import say
from twotower.embedding.source import pairs_to_encode
from twotower.quality.doctor import examine, lines, output_folder, write


def run(config: Config, free: FreeText) -> None:
    """Examine `path=` or the data section, write what was found, and say it in a few lines."""
    pairs = pairs_to_encode(config.data, free.path)
    folder = output_folder(config, pairs)
    diagnosis = examine(config, pairs, folder, free.path)
    summary = write(config, pairs, diagnosis, folder)
    for line in lines(summary, folder):
        say(line)
