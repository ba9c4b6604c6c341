"""How pictures become a tower's input: uint8 squares, and the constants that go with them."""

from __future__ import annotations

import enum
import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from twotower.checkpoint.clip import OPENAI_MEAN, OPENAI_STD
from twotower.decoded import Decoded, Picture
from twotower.model_config import ModelConfig
from twotower.models.dual_encoder import PixelNorm

SPARE = 2  # pixels of a picture that is decoded smaller, to each pixel of its square
RATIOS = (3 / 4, 4 / 3)  # width to height of random crops
WIDEST = 100  # long side over short side that is resized whole; of a longer strip, the middle


class Interpolation(enum.Enum):
    """How a picture is resized, always with antialiasing."""

    bicubic = "bicubic"
    bilinear = "bilinear"


def _pixels(picture: Picture) -> tuple[Tensor, tuple[int, int]]:
    """As uint8 (1, 3, h, w), channels last, where torch resizes fast; and the file's size."""
    if not isinstance(picture, Decoded):
        picture = Decoded(np.array(picture), (picture.height, picture.width))
    return torch.from_numpy(picture.pixels).unsqueeze(0).permute(0, 3, 1, 2), picture.size


def _resize(
    pixels: Tensor,
    size: tuple[int, int],
    how: Interpolation,
    covered: tuple[float, float] | None = None,
) -> Tensor:
    """Antialiased, (1, 3, h, w) -> (3, *size), channels last.

    `covered` are the rows and columns, and parts of them, that become `size`, by default all: of
    1,333 columns at half size 667 are decoded, of which the last is covered by half.
    """
    if covered is None or covered == tuple(pixels.shape[-2:]):
        return F.interpolate(pixels, size, mode=how.value, antialias=True)[0]
    scales = tuple(to / of * (1 + 1e-9) for to, of in zip(size, covered, strict=True))
    resized = F.interpolate(pixels, scale_factor=scales, mode=how.value, antialias=True)
    return resized[0, :, : size[0], : size[1]]


def _dense(pixels: Tensor) -> Tensor:
    """A cut of a picture, without what was cut off, channels last."""
    return pixels.permute(1, 2, 0).contiguous().permute(2, 0, 1)


@dataclass(frozen=True)
class EvalTransform:
    """RGB picture -> uint8 (3, size, size): short side to `size`, then the centre, as in CLIP.

    The crop is torchvision's `Resize(size)` and `CenterCrop(size)` to the pixel, also of a picture
    that was decoded smaller than it is in its file.

    Attributes:
        exact: wants every pixel of a file; else decoding may leave its shorter side `side` pixels.
    """

    size: int
    interpolation: Interpolation = Interpolation.bicubic
    exact: bool = True

    @property
    def side(self) -> int:
        """Pixels that the shorter side of a decoded picture must keep; 0 is all."""
        return 0 if self.exact else SPARE * self.size

    def __call__(self, picture: Picture) -> Tensor:
        size = self.size
        pixels, (height, width) = _trimmed(*_pixels(picture))
        covered = _covered(pixels, (height, width))
        short = min(height, width)
        height, width = int(size * height / short), int(size * width / short)
        pixels = _resize(pixels, (height, width), self.interpolation, covered)
        top, left = round((height - size) / 2), round((width - size) / 2)
        return _dense(pixels[:, top : top + size, left : left + size])


def _trimmed(pixels: Tensor, size: tuple[int, int]) -> tuple[Tensor, tuple[int, int]]:
    """The middle of a picture that is extremely long, so that a strip cannot ask for gigabytes."""
    tall, wide = pixels.shape[-2:]
    longest = WIDEST * min(tall, wide)
    if max(tall, wide) <= longest:
        return pixels, size
    top, left = max(0, (tall - longest) // 2), max(0, (wide - longest) // 2)
    pixels = pixels[..., top : top + longest, left : left + longest]
    return pixels, (pixels.shape[-2], pixels.shape[-1])


def _covered(pixels: Tensor, size: tuple[int, int]) -> tuple[float, float]:
    """Rows and columns of what was decoded that a file's own fill, the last maybe in part.

    A JPEG is decoded at eighths of its size, each side rounded up.
    """
    tall, wide = pixels.shape[-2:]
    eighths = math.floor(8 * min(tall / size[0], wide / size[1]) + 1e-9) if 0 not in size else 8
    return size[0] * eighths / 8, size[1] * eighths / 8


@dataclass(frozen=True)
class TrainTransform:
    """RGB picture -> uint8 (3, size, size): a random crop, drawn by torch's global generator.

    Attributes:
        min_scale: smallest share of the picture's area that a crop keeps.
        flip: mirror every second picture; wrong where captions tell left from right.
        exact: as for `EvalTransform`; the smallest crop keeps twice its side then.
    """

    size: int
    interpolation: Interpolation = Interpolation.bicubic
    min_scale: float = 0.9
    flip: bool = False
    exact: bool = True

    @property
    def side(self) -> int:
        """Pixels that the shorter side of a decoded picture must keep; 0 is all."""
        narrowest = math.sqrt(self.min_scale * min(RATIOS))  # crop, of a square picture
        return 0 if self.exact else math.ceil(SPARE * self.size / narrowest)

    def __call__(self, picture: Picture) -> Tensor:
        from torchvision.transforms import RandomResizedCrop

        pixels, (height, width) = _pixels(picture)
        whole = torch.empty(3, height, width, device="meta")
        box = RandomResizedCrop.get_params(whole, [self.min_scale, 1.0], list(RATIOS))
        tall, wide = _covered(pixels, (height, width))
        down, across = tall / height, wide / width
        top, bottom = round(box[0] * down), round((box[0] + box[2]) * down)
        left, right = round(box[1] * across), round((box[1] + box[3]) * across)
        pixels = pixels[..., top : max(bottom, top + 1), left : max(right, left + 1)]
        pixels = _resize(pixels, (self.size, self.size), self.interpolation)
        if self.flip and torch.rand(()) < 0.5:
            pixels = pixels.flip(-1)
        return _dense(pixels)


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

    def eval_transform(self, config: ModelConfig) -> EvalTransform:
        """The transform of evaluation and encoding, as exact as a model section asks for."""
        return EvalTransform(self.size, self.interpolation, config.exact)

    def train_transform(self, config: ModelConfig) -> TrainTransform:
        """The transform with the augmentation of a model section."""
        scale, flip = config.crop_min_scale, config.flip
        return TrainTransform(self.size, self.interpolation, scale, flip, config.exact)

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
