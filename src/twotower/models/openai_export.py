"""Writing a trained OpenAI variant in OpenAI's format, and making sure that it came out equal."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from twotower.checkpoint.openai import infer_architecture, read_openai, write_openai
from twotower.models.dual_encoder import DualEncoder, ModelBundle
from twotower.models.lora import merge_adapters
from twotower.models.openai_clip import (
    architecture_of,
    build_towers,
    load_openai_weights,
    to_openai_names,
)
from twotower.models.preprocess import OPENAI_MEAN, OPENAI_STD, ImageInput
from twotower.settings import ConfigError


def to_openai_state_dict(bundle: ModelBundle) -> dict[str, Tensor]:
    """A bundle's weights under OpenAI's names, adapters merged, for any reader of the format.

    Raises:
        ConfigError: the bundle is no OpenAI architecture, or has an activation or constants that
            the format cannot say and its readers would silently get wrong.
    """
    bundle = merge_adapters(bundle)
    variant = bundle.config.registered_name
    if "architecture" not in bundle.assets:
        raise ConfigError(
            f"a checkpoint of {variant} cannot be written in OpenAI's format, which holds OpenAI's "
            "architectures only; export one of openai_finetune or openai_pretrain"
        )
    if bundle.assets["activation"] != "quick_gelu":
        raise ConfigError(
            "these weights use GELU, but readers of OpenAI's format take QuickGELU; they cannot be "
            "exported"
        )
    image_input = ImageInput.from_json(bundle.assets["image_input"])
    if (image_input.mean, image_input.std) != (OPENAI_MEAN, OPENAI_STD):
        raise ConfigError(
            "these weights have their own pixel mean and std, but readers of OpenAI's format take "
            "OpenAI's; they cannot be exported"
        )
    return to_openai_names(bundle.model.state_dict())


def export_openai(bundle: ModelBundle, path: Path) -> None:
    """Write a bundle in OpenAI's format in fp32, read it again, and compare the features of both.

    Raises:
        ConfigError: as `to_openai_state_dict`, or the file cannot be written.
        RuntimeError: the features differ.
    """
    bundle = merge_adapters(bundle)
    write_openai(path, to_openai_state_dict(bundle))
    weights = read_openai(path)
    architecture = infer_architecture(weights)
    if architecture != architecture_of(bundle.assets):
        raise RuntimeError(f"{path} came out as {architecture}")
    image_input = ImageInput.from_json(bundle.assets["image_input"])
    again = build_towers(architecture, image_input, quick_gelu=True)
    load_openai_weights(again, weights, path)
    # torch takes other kernels for weights that need a gradient, even where none is computed.
    for ours, theirs in zip(bundle.model.parameters(), again.parameters(), strict=True):
        theirs.requires_grad_(ours.requires_grad)
    generator = torch.Generator().manual_seed(0)
    size = architecture.image_size
    images = torch.randint(0, 256, (2, 3, size, size), dtype=torch.uint8, generator=generator)
    tokens = bundle.tokenizer(["a dog on the beach", ""])
    if not torch.equal(_features(bundle.model, images, tokens), _features(again, images, tokens)):
        raise RuntimeError(f"the features of {path} differ from those of the checkpoint")


def _features(model: DualEncoder, images: Tensor, tokens: Tensor) -> Tensor:
    model = model.cpu().eval()
    with torch.inference_mode():
        return torch.cat([model.encode_image(images), model.encode_text(tokens)])
