"""A CLIP of OpenAI's architectures, whichever format it is read from or written to.

The names of the tensors and what is inferred from them follow `clip/model.py` of
github.com/openai/CLIP (MIT); Radford et al. 2021.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from twotower.settings import ConfigError

OPENAI_MEAN = (0.48145466, 0.4578275, 0.40821073)
OPENAI_STD = (0.26862954, 0.26130258, 0.27577711)
HEAD_WIDTH = 64  # OpenAI's models have one attention head per 64 channels, and infer the heads so
MLP_RATIO = 4.0  # and their hidden layers are four times as wide as what they stand between


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """What a CLIP of OpenAI's kind is made of.

    Attributes:
        embed_dim: dimension D of the joint space.
        image_size: side of the input in pixels.
        vision_layers: blocks of the vision transformer, or of each of ModifiedResNet's four stages.
        vision_width: channels of the vision transformer, or of ModifiedResNet's stem.
        patch_size: side of a patch in pixels; 0 for a ModifiedResNet.
        context_length, vocab_size, text_width, text_layers: the text transformer.
        vision_head_width, text_head_width: channels of an attention head.
        vision_mlp_ratio, text_mlp_ratio: width of a block's hidden layer over the block's.
    """

    embed_dim: int
    image_size: int
    vision_layers: int | tuple[int, int, int, int]
    vision_width: int
    patch_size: int
    context_length: int = 77
    vocab_size: int = 49408
    text_width: int = 512
    text_layers: int = 12
    vision_head_width: int = HEAD_WIDTH
    text_head_width: int = HEAD_WIDTH
    vision_mlp_ratio: float = MLP_RATIO
    text_mlp_ratio: float = MLP_RATIO

    @property
    def has_openai_rules(self) -> bool:
        """Whether heads and hidden layers are as OpenAI's format takes them, which cannot tell."""
        widths = (self.vision_head_width, self.text_head_width)
        ratios = (self.vision_mlp_ratio, self.text_mlp_ratio)
        return widths == (HEAD_WIDTH,) * 2 and ratios == (MLP_RATIO,) * 2


@dataclass(frozen=True, kw_only=True)
class Pixels:
    """What the weights were trained to see: mean and deviation of red, green, blue; resizing."""

    mean: tuple[float, float, float] = OPENAI_MEAN
    std: tuple[float, float, float] = OPENAI_STD
    interpolation: str = "bicubic"


@dataclass(frozen=True, kw_only=True)
class ClipCheckpoint:
    """The weights of a CLIP under OpenAI's names, and what they were trained with.

    Attributes:
        quick_gelu: QuickGELU, else GELU; None where the format does not tell.
        pixels: OpenAI's where the format does not tell.
        source: the file or folder, for sentences.
    """

    weights: dict[str, Tensor]
    architecture: Architecture
    quick_gelu: bool | None
    source: str
    pixels: Pixels = Pixels()


def _count(weights: Mapping[str, Tensor], pattern: str) -> int:
    return len({found[1] for name in weights if (found := re.match(pattern, name))})


def _mlp_ratio(weights: Mapping[str, Tensor], transformer: str) -> float:
    """The ratio r for which int(width * r) is the width of the hidden layer."""
    weight = weights.get(f"{transformer}.resblocks.0.mlp.c_fc.weight")
    if weight is None:
        return MLP_RATIO
    hidden, width = weight.shape
    ratio = hidden / width
    return ratio if int(width * ratio) == hidden else math.nextafter(ratio, math.inf)


def infer_architecture(
    weights: Mapping[str, Tensor],
    *,
    vision_head_width: int = HEAD_WIDTH,
    text_head_width: int = HEAD_WIDTH,
) -> Architecture:
    """The architecture that weights belong to; the width of a head is not to be seen in them.

    Raises:
        ConfigError: the shapes are not those of a CLIP of OpenAI's kind.
    """
    try:
        vision_width = weights["visual.conv1.weight"].shape[0]
        layers: int | tuple[int, int, int, int]
        if "visual.proj" in weights:
            patch_size = weights["visual.conv1.weight"].shape[-1]
            positions = weights["visual.positional_embedding"].shape[0]
            layers = _count(weights, r"visual\.transformer\.resblocks\.(\d+)\.attn\.in_proj_weight")
            image_size = patch_size * round((positions - 1) ** 0.5)
        else:
            vision_width = weights["visual.layer1.0.conv1.weight"].shape[0]
            patch_size = 0
            positions = weights["visual.attnpool.positional_embedding"].shape[0]
            stages = [_count(weights, rf"visual\.layer{stage}\.(\d+)") for stage in (1, 2, 3, 4)]
            layers = (stages[0], stages[1], stages[2], stages[3])
            image_size = 32 * round((positions - 1) ** 0.5)
        return Architecture(
            embed_dim=weights["text_projection"].shape[1],
            image_size=image_size,
            vision_layers=layers,
            vision_width=vision_width,
            patch_size=patch_size,
            context_length=weights["positional_embedding"].shape[0],
            vocab_size=weights["token_embedding.weight"].shape[0],
            text_width=weights["ln_final.weight"].shape[0],
            text_layers=_count(weights, r"transformer\.resblocks\.(\d+)"),
            vision_head_width=vision_head_width,
            text_head_width=text_head_width,
            vision_mlp_ratio=_mlp_ratio(weights, "visual.transformer"),
            text_mlp_ratio=_mlp_ratio(weights, "transformer"),
        )
    except (KeyError, IndexError, ValueError) as error:
        raise ConfigError(
            f"the weights are not those of a CLIP of OpenAI's kind: {error}"
        ) from error
