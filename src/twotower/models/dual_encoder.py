"""The one shared abstraction: an image tower, a text tower and a learned temperature."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from twotower.decoded import ImageTransform
from twotower.model_config import ModelConfig
from twotower.registry import Registry

INITIAL_LOGIT_SCALE = math.log(1 / 0.07)  # Radford et al. 2021, section 2.5
MAX_LOGIT_SCALE = math.log(100)  # same: clipped so that logits are never scaled by more than 100


class Tokenizer(Protocol):
    """Turns captions into ids (N, context_length) int64, cut to it or padded with `pad_id`."""

    @property
    def context_length(self) -> int: ...

    @property
    def pad_id(self) -> int: ...

    def __call__(self, texts: Sequence[str]) -> Tensor: ...


class DualEncoderOutput(NamedTuple):
    """Unit-norm features (B, D) of either tower, the factor of their cosines, and what is added.

    `logit_bias` is 0 unless the model was trained with a loss that learns it.
    """

    image_features: Tensor
    text_features: Tensor
    logit_scale: Tensor
    logit_bias: Tensor


class Tower(nn.Module):
    """A trunk and the head that projects its features into the joint space.

    `locked` says that the trunk is not trained, so that its features of a data set may be computed
    once.
    """

    def __init__(self, trunk: nn.Module, head: nn.Module, *, locked: bool = False) -> None:
        super().__init__()
        self.trunk = trunk
        self.head = head
        self.locked = locked
        if locked:
            trunk.requires_grad_(False)

    def train(self, mode: bool = True) -> Tower:
        """Switch to training; a locked trunk stays in evaluation, with dropout and batch norm."""
        super().train(mode)
        if self.locked:
            self.trunk.eval()
        return self

    def forward(self, inputs: Tensor) -> Tensor:
        if self.locked:
            with torch.no_grad():
                features = self.trunk(inputs)
        else:
            features = self.trunk(inputs)
        projected: Tensor = self.head(features)
        return projected


class PixelNorm(nn.Module):
    """Scales uint8 pictures (B, 3, H, W) as a trunk was trained; floats pass unchanged.

    Normalising here, and not in the data loader, moves a quarter of the bytes to the device and
    keeps a pretrained trunk with its own constants.
    """

    scale: Tensor
    shift: Tensor

    def __init__(self, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        self.mean, self.std = tuple(mean), tuple(std)
        means, stds = torch.tensor([self.mean, self.std], dtype=torch.float64)
        self.register_buffer("scale", (1 / (255 * stds)).float(), persistent=False)
        self.register_buffer("shift", (-means / stds).float(), persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        if images.dtype != torch.uint8:
            return images
        # The result has its channels last: there convolutions are twice as fast on CPUs, and no
        # slower on GPUs. Whole rows of pixels at a time, four times as fast as three channels.
        batch, channels, height, width = images.shape
        rows = images.permute(0, 2, 3, 1).reshape(batch, height, width * channels)
        scaled = rows.to(self.scale.dtype).mul_(self.scale.repeat(width))
        scaled = scaled.add_(self.shift.repeat(width))
        return scaled.view(batch, height, width, channels).permute(0, 3, 1, 2)


class DualEncoder(nn.Module):
    """An image tower, a text tower and a learned temperature, as in CLIP (Radford et al. 2021).

    `logit_scale` is stored as a logarithm and used as `logit_scale.exp()`. `logit_bias` is None
    unless the loss learns it (Zhai et al. 2023).
    """

    def __init__(
        self,
        image_tower: nn.Module,
        text_tower: nn.Module,
        logit_scale: nn.Parameter | None = None,
        logit_bias: nn.Parameter | None = None,
    ) -> None:
        super().__init__()
        self.image_tower = image_tower
        self.text_tower = text_tower
        if logit_scale is None:
            logit_scale = nn.Parameter(torch.tensor(INITIAL_LOGIT_SCALE))
        self.logit_scale = logit_scale
        self.logit_bias = logit_bias

    def encode_image(self, images: Tensor, normalize: bool = False) -> Tensor:
        """uint8 or normalised pictures (B, 3, H, W) -> features (B, D), of unit norm if asked."""
        features: Tensor = self.image_tower(images)
        return F.normalize(features, dim=-1) if normalize else features

    def encode_text(self, tokens: Tensor, normalize: bool = False) -> Tensor:
        """Token ids (B, L) -> features (B, D), of unit norm if asked."""
        features: Tensor = self.text_tower(tokens)
        return F.normalize(features, dim=-1) if normalize else features

    def forward(self, images: Tensor, tokens: Tensor) -> DualEncoderOutput:
        return DualEncoderOutput(
            self.encode_image(images, normalize=True),
            self.encode_text(tokens, normalize=True),
            self.logit_scale.exp(),
            torch.zeros_like(self.logit_scale) if self.logit_bias is None else self.logit_bias,
        )

    def start_temperature(self, logit_scale: float, logit_bias: float) -> None:
        """Let the temperature start from these values, unless its weights bring a bias."""
        if self.logit_bias is None:
            with torch.no_grad():
                self.logit_scale.fill_(logit_scale)
            self.logit_bias = nn.Parameter(torch.full_like(self.logit_scale, logit_bias))

    @torch.no_grad()
    def clamp_logit_scale(self) -> None:
        """Keep the temperature in [0, ln 100]; call it after each optimiser step."""
        self.logit_scale.clamp_(0, MAX_LOGIT_SCALE)


@dataclass(kw_only=True)
class ModelBundle:
    """A model with everything that must go with it: how pictures and captions become its inputs.

    Attributes:
        model: the dual encoder, on the CPU when built. train_transform: picture -> uint8 (3, H,
        W), with augmentation. eval_transform: picture -> uint8 (3, H, W), deterministic.
        tokenizer: captions -> token ids (N, L). config: the section it was built from. assets:
        texts (JSON) that a checkpoint must keep to build the model again without its sources: the
            tokenizer, the architectures. Given back to the build function, no pretrained weights
            are read.
    """

    model: DualEncoder
    train_transform: ImageTransform
    eval_transform: ImageTransform
    tokenizer: Tokenizer
    config: ModelConfig
    assets: dict[str, str] = field(default_factory=dict)


MODELS: Registry[ModelBundle] = Registry("model")
