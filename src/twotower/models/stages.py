"""The stages of an encoder: what locking and layer-wise learning rates count from the top."""

from __future__ import annotations

import re

from torch import nn

from twotower.models import timm_image
from twotower.models.dual_encoder import PixelNorm
from twotower.models.huggingface_text import HuggingFaceText
from twotower.settings import ConfigError

Stages = list[list[nn.Parameter]]

_BLOCK = re.compile(r"transformer\.resblocks\.(\d+)\.|layer(\d)\.")
_TOP = ("ln_post.", "proj", "attnpool.", "ln_final.", "text_projection")


def encoder_stages(trunk: nn.Module, otherwise: str) -> Stages:
    """The parameters of a trunk in the order of its forward pass, one list a stage.

    timm's coarse groups; Hugging Face's embeddings, then each layer; open_clip's embeddings, then
    each block, then the last norm and the projection, or stem, layer1 to layer4, attention pool.

    Raises:
        ConfigError: the encoder does not tell its stages; `otherwise` is the sentence.
    """
    encoder = bare_encoder(trunk)
    if isinstance(encoder, HuggingFaceText):
        return encoder.stages()
    if hasattr(encoder, "group_matcher"):
        return timm_image.stages(encoder)
    if any(_BLOCK.match(name) for name, _ in encoder.named_parameters()):
        return _openai_stages(encoder)
    raise ConfigError(otherwise)


def bare_encoder(trunk: nn.Module) -> nn.Module:
    """A trunk without the pixel normalisation that stands before an image encoder."""
    if isinstance(trunk, nn.Sequential) and len(trunk) == 2 and isinstance(trunk[0], PixelNorm):
        return trunk[1]
    return trunk


def _openai_stages(encoder: nn.Module) -> Stages:
    first: list[nn.Parameter] = []
    last: list[nn.Parameter] = []
    blocks: dict[int, list[nn.Parameter]] = {}
    for name, parameter in encoder.named_parameters():
        block = _BLOCK.match(name)
        if block:
            blocks.setdefault(int(block[1] or block[2]), []).append(parameter)
        elif name.startswith(_TOP):
            last.append(parameter)
        else:
            first.append(parameter)
    return [first, *(blocks[number] for number in sorted(blocks)), last]
