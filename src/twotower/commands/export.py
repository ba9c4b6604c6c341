"""`twotower export path=out.pt`: a checkpoint in OpenAI's format, which `clip.load` opens."""

from __future__ import annotations

from pathlib import Path

from twotower.config import Config, FreeText
from twotower.console import say
from twotower.models.openai_export import export_openai
from twotower.models.saved import load_bundle
from twotower.runs import checkpoint_path
from twotower.settings import ConfigError


def run(config: Config, free: FreeText) -> None:
    """Write the run's checkpoint, or `checkpoint=`, to `path=`."""
    if not free.path:
        raise ConfigError("export needs path=<name>.pt, the file to write")
    bundle = load_bundle(checkpoint_path(config))
    path = Path(free.path)
    export_openai(bundle, path)
    say(
        f"{path}: OpenAI's format, features equal; open it with clip.load({str(path)!r}) and "
        f"clip.tokenize(texts, context_length={bundle.tokenizer.context_length}), "
        f"or with model=openai_finetune model.weights={path}"
    )
