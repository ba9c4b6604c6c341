"""open_clip's format: a folder that `open_clip.create_model("local-dir:<folder>")` opens."""

from __future__ import annotations

from pathlib import Path

import torch

from twotower.checkpoint.open_clip import write_open_clip
from twotower.export.probe import Features, Probe, check_equal, features_of
from twotower.export.quiet import quiet
from twotower.models.clip_weights import clip_of
from twotower.models.dual_encoder import ModelBundle


def write(bundle: ModelBundle, folder: Path) -> None:
    """Write weights and `open_clip_config.json` into a folder.

    Raises:
        ConfigError: the bundle is no OpenAI architecture.
    """
    write_open_clip(folder, clip_of(bundle))


def check(bundle: ModelBundle, folder: Path, probe: Probe) -> None:
    """Read the folder with open_clip: its model, its preparation of pictures, its tokenizer.

    Raises:
        RuntimeError: the features differ.
    """
    import open_clip

    name = f"local-dir:{folder}"
    with quiet():
        model, _, prepare = open_clip.create_model_and_transforms(name)
        tokenize = open_clip.get_tokenizer(name)
    model.eval()
    pictures = torch.stack([prepare(image) for image in probe.images()])
    with torch.inference_mode():
        found: Features = (
            model.encode_image(pictures),
            model.encode_text(tokenize(list(probe.captions))),
        )
    check_equal(features_of(bundle.model, bundle.tokenizer, probe), found, "open_clip")


def hint(bundle: ModelBundle, folder: Path) -> str:
    """How the folder is opened elsewhere."""
    name = f"local-dir:{folder}"
    return f"open_clip.create_model_and_transforms({name!r}) and open_clip.get_tokenizer({name!r})"
