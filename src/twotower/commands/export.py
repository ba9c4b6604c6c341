"""`twotower export`: a checkpoint in OpenAI's, open_clip's, Hugging Face's format or as ONNX."""

from __future__ import annotations

from pathlib import Path

from twotower.config import Config, ExportFormat, FreeText
from twotower.console import say
from twotower.export.formats import export_bundle
from twotower.export.probe import make_probe
from twotower.models.saved import load_bundle
from twotower.runs import checkpoint_path
from twotower.settings import ConfigError


def run(config: Config, free: FreeText) -> None:
    """Write the run's checkpoint, or `checkpoint=`, in `format=` to `path=`."""
    if not free.path:
        example = "<name>.pt, the file" if config.format is ExportFormat.openai else "<folder>"
        raise ConfigError(f"export needs path={example} to write")
    checkpoint = checkpoint_path(config)
    bundle = load_bundle(checkpoint)
    path = Path(free.path)
    say(export_bundle(bundle, config.format, path, make_probe(bundle, checkpoint)))
    if config.format is not ExportFormat.onnx:
        say(f"or train on from it: model=openai_finetune model.weights={path}")
