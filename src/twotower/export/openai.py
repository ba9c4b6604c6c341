"""OpenAI's format: one file with a state dict, which `clip.load` opens."""

from __future__ import annotations

from pathlib import Path

import torch

from twotower.checkpoint.clip import Pixels, infer_architecture
from twotower.checkpoint.openai import in_half, read_openai, write_openai
from twotower.export.probe import Features, Probe, check_equal, features_of
from twotower.models.clip_weights import clip_of
from twotower.models.dual_encoder import DualEncoder, ModelBundle
from twotower.models.openai_clip import build_towers, load_openai_weights
from twotower.models.preprocess import ImageInput
from twotower.settings import ConfigError


def write(bundle: ModelBundle, path: Path) -> None:
    """Write a bundle in OpenAI's format in fp32.

    Raises:
        ConfigError: the bundle is no OpenAI architecture, or has an activation, constants or heads
            that the format cannot say and its readers would silently get wrong.
    """
    clip = clip_of(bundle)
    reasons = {
        "use GELU, but readers of OpenAI's format take QuickGELU": not clip.quick_gelu,
        "have pixel constants or a resizing of their own, but readers of OpenAI's format take "
        "OpenAI's": clip.pixels != Pixels(),
        "have heads or hidden layers of their own width, but readers of OpenAI's format take "
        "OpenAI's": not clip.architecture.has_openai_rules,
    }
    for reason, holds in reasons.items():
        if holds:
            raise ConfigError(
                f"these weights {reason}; they cannot be exported to it, but to format=open_clip"
            )
    weights = {name: tensor for name, tensor in clip.weights.items() if name != "logit_bias"}
    write_openai(path, weights)


def check(bundle: ModelBundle, path: Path, probe: Probe) -> None:
    """Read the file again, here and with open_clip's copy of OpenAI's loader.

    The latter rounds matrices to half precision, as `clip.load` does, so it is compared with
    weights that were rounded in the same way.

    Raises:
        RuntimeError: the features differ.
    """
    from open_clip.model import build_model_from_openai_state_dict

    weights = read_openai(path)
    again = _towers(weights, path)
    ours = features_of(bundle.model, bundle.tokenizer, probe)
    check_equal(ours, features_of(again, bundle.tokenizer, probe), "twotower")
    halved = in_half(weights)
    again = _towers(halved, path)
    theirs = build_model_from_openai_state_dict(halved, cast_dtype=torch.float32).float().eval()
    pictures = ImageInput(size=probe.pictures.shape[-1]).norm()(probe.pictures)
    with torch.inference_mode():
        found: Features = (
            theirs.encode_image(pictures),
            theirs.encode_text(bundle.tokenizer(probe.captions)),
        )
    check_equal(features_of(again, bundle.tokenizer, probe), found, "OpenAI's loader")


def hint(bundle: ModelBundle, path: Path) -> str:
    """How the file is opened elsewhere."""
    return (
        f"clip.load({str(path)!r}) and "
        f"clip.tokenize(texts, context_length={bundle.tokenizer.context_length})"
    )


def _towers(weights: dict[str, torch.Tensor], path: Path) -> DualEncoder:
    architecture = infer_architecture(weights)
    image_input = ImageInput(size=architecture.image_size)
    model = build_towers(architecture, image_input, quick_gelu=True)
    load_openai_weights(model, weights, path)
    return model
