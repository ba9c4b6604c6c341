"""How pictures become a tower's input: uint8 squares, and the constants that go with them."""

from __future__ import annotations

import enum
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import numpy as np
import torch
import torch.nn.functional as F
from PIL.Image import Image
from torch import Tensor

from twotower.checkpoint.clip import OPENAI_MEAN, OPENAI_STD
from twotower.model_config import ModelConfig
from twotower.models.dual_encoder import PixelNorm

WIDEST = 100  # long side over short side that is resized whole; of a longer strip, the middle


class Interpolation(enum.Enum):
    """How a picture is resized, always with antialiasing."""

    bicubic = "bicubic"
    bilinear = "bilinear"


def _pixels(image: Image) -> Tensor:
    """An RGB picture as uint8 (1, 3, H, W) in PIL's memory order, where torch resizes fast."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).unsqueeze(0)


def _resize(pixels: Tensor, height: int, width: int, interpolation: Interpolation) -> Tensor:
    size = (height, width)
    return F.interpolate(pixels, size, mode=interpolation.value, antialias=True)


@dataclass(frozen=True)
class EvalTransform:
    """RGB picture -> uint8 (3, size, size): short side to `size`, then the centre, as in CLIP.

    The crop is torchvision's `Resize(size)` and `CenterCrop(size)` to the pixel.
    """

    size: int
    interpolation: Interpolation = Interpolation.bicubic

    def __call__(self, image: Image) -> Tensor:
        size = self.size
        pixels = _pixels(_trimmed(image))
        height, width = pixels.shape[-2:]
        short = min(height, width)
        height, width = int(size * height / short), int(size * width / short)
        pixels = _resize(pixels, height, width, self.interpolation)[0]
        top, left = round((height - size) / 2), round((width - size) / 2)
        return pixels[:, top : top + size, left : left + size].contiguous()


def _trimmed(image: Image) -> Image:
    """The middle of a picture that is extremely long, so that a strip cannot ask for gigabytes."""
    width, height = image.size
    longest = WIDEST * min(width, height)
    if max(width, height) <= longest:
        return image
    left, top = max(0, (width - longest) // 2), max(0, (height - longest) // 2)
    return image.crop((left, top, min(width, left + longest), min(height, top + longest)))


@dataclass(frozen=True)
class TrainTransform:
    """RGB picture -> uint8 (3, size, size): a random crop, drawn by torch's global generator.

    Attributes:
        min_scale: smallest share of the picture's area that a crop keeps.
        flip: mirror every second picture; wrong where captions tell left from right.
    """

    size: int
    interpolation: Interpolation = Interpolation.bicubic
    min_scale: float = 0.9
    flip: bool = False

    def __call__(self, image: Image) -> Tensor:
        from torchvision.transforms import RandomResizedCrop

        top, left, height, width = RandomResizedCrop.get_params(
            image, scale=[self.min_scale, 1.0], ratio=[3 / 4, 4 / 3]
        )
        pixels = _pixels(image.crop((left, top, left + width, top + height)))
        pixels = _resize(pixels, self.size, self.size, self.interpolation)[0]
        if self.flip and torch.rand(()) < 0.5:
            pixels = pixels.flip(-1)
        return pixels.contiguous()


@dataclass(frozen=True, kw_only=True)
class ImageInput:
    """What a trunk wants to see: the side in pixels, and the constants of its weights.

    Attributes:
        size: side of the square in pixels.
        mean, std: of the red, green and blue channel, on the scale where white is 1.
        interpolation: how pictures are resized.
    """

    size: int
    mean: tuple[float, float, float] = OPENAI_MEAN
    std: tuple[float, float, float] = OPENAI_STD
    interpolation: Interpolation = Interpolation.bicubic

    def norm(self) -> PixelNorm:
        """The first layer of an image trunk."""
        return PixelNorm(self.mean, self.std)

    def eval_transform(self) -> EvalTransform:
        return EvalTransform(self.size, self.interpolation)

    def train_transform(self, config: ModelConfig) -> TrainTransform:
        """The transform with the augmentation of a model section."""
        return TrainTransform(self.size, self.interpolation, config.crop_min_scale, config.flip)

    def to_json(self) -> str:
        return json.dumps({**asdict(self), "interpolation": self.interpolation.name})

    @classmethod
    def from_json(cls, text: str) -> ImageInput:
        values = json.loads(text)
        return cls(
            size=values["size"],
            mean=rgb(values["mean"]),
            std=rgb(values["std"]),
            interpolation=Interpolation[values["interpolation"]],
        )


def rgb(values: Sequence[float]) -> tuple[float, float, float]:
    """Three numbers as a tuple of three."""
    red, green, blue = values
    return red, green, blue
