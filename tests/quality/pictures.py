"""Pictures for the tests: like photographs in that their detail falls with its fineness."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
from PIL import Image

from twotower.quality.picture import Limits

LIMITS = Limits(max_pixels=1_000_000, min_side=32)


def photograph(seed: int, width: int = 160, height: int = 120) -> Image.Image:
    """Blotches of every size, of their own colours."""
    rng = np.random.default_rng(seed)
    pixels = np.zeros((height, width, 3), np.float32)
    for cells in (2, 4, 8, 16, 32):
        coarse = rng.normal(0, 60 / cells**0.6, (cells, cells, 1)) + rng.normal(
            0, 20 / cells**0.6, (cells, cells, 3)
        )
        planes = [
            Image.fromarray(coarse[:, :, c].astype(np.float32)).resize(
                (width, height), Image.Resampling.BICUBIC
            )
            for c in range(3)
        ]
        pixels += np.stack([np.asarray(plane) for plane in planes], 2)
    return Image.fromarray((pixels + 128).clip(0, 255).astype(np.uint8))


def encoded(image: Image.Image, kind: str = "JPEG", **options: object) -> bytes:
    """A picture as the bytes of a file."""
    file = io.BytesIO()
    image.save(file, kind, **({"quality": 92} if kind == "JPEG" else {}) | options)
    return file.getvalue()


def write(path: Path, image: Image.Image, **options: object) -> Path:
    """A picture in a JPEG file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(encoded(image, **options))
    return path


def resized(image: Image.Image) -> Image.Image:
    """To 80 %."""
    return image.resize((image.width * 4 // 5, image.height * 4 // 5), Image.Resampling.BICUBIC)


def cropped(image: Image.Image) -> Image.Image:
    """By 5 % on each side."""
    x, y = round(0.05 * image.width), round(0.05 * image.height)
    return image.crop((x, y, image.width - x, image.height - y))
