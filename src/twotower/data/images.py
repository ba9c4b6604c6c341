"""Decoding: any picture file or bytes -> an upright RGB picture."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from twotower.data.heif import open_image, why_unknown
from twotower.data.jpeg import decode_jpeg, is_jpeg
from twotower.data.places import read_bytes
from twotower.decoded import Decoded, ImageTransform

# Also what this installation may not decode: such a file is listed as unreadable, not left out.
SUFFIXES = (
    *(".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff"),
    *(".avif", ".heic", ".heif"),
)


class UnreadableImage(Exception):
    """A picture that cannot be decoded; the message is the reason in a few words."""


def decode_image(source: str | Path | bytes | Image.Image) -> Image.Image:
    """Open a picture: its first frame, EXIF orientation applied, alpha laid on white, 8-bit RGB.

    A path may name a piece of a larger file, as `data/places.py` says.

    Raises:
        UnreadableImage: it is missing, empty, truncated, no picture, or a decompression bomb.
    """
    try:
        if isinstance(source, Image.Image):
            return _upright_rgb(source)
        # From memory: no file stays open behind an animation, and no message holds a path.
        data = source if isinstance(source, bytes) else read_bytes(source)
        if not data:
            raise UnreadableImage("the file is empty")
        with open_image(data) as image:
            return _upright_rgb(image)
    except UnreadableImage:
        raise
    except UnidentifiedImageError as error:
        raise UnreadableImage(why_unknown(data)) from error
    except Image.DecompressionBombError as error:
        raise UnreadableImage("too many pixels: it could be a decompression bomb") from error
    except Exception as error:  # damaged files leave Pillow's decoders by any exception there is
        raise UnreadableImage(_reason(error)) from error


def decode_pixels(source: str | Path | bytes | Image.Image, side: int = 0) -> Decoded:
    """The same as an array, quicker; a JPEG may come smaller, its shorter side not below `side`.

    Args:
        side: 0 takes every pixel.

    Raises:
        UnreadableImage: as `decode_image`.
    """
    if not isinstance(source, Image.Image):
        try:
            data = source if isinstance(source, bytes) else read_bytes(source)
        except OSError as error:
            raise UnreadableImage(_reason(error)) from error
        found = decode_jpeg(data, side) if is_jpeg(data) else None
        if found is not None:
            return found
        source = data
    pixels = np.array(decode_image(source))
    return Decoded(pixels, (pixels.shape[0], pixels.shape[1]))


def transformed(source: str | Path | bytes | Image.Image, transform: ImageTransform) -> Tensor:
    """A picture as uint8 (3, H, W), decoded no further than its transform needs.

    Raises:
        UnreadableImage: as `decode_image`.
    """
    return transform(decode_pixels(source, transform.side))


def stack_pictures(pictures: Sequence[Tensor]) -> Tensor:
    """Pictures (3, H, W) of one size as a batch (B, 3, H, W), channels last as decoders leave them.

    `torch.stack` would put the channels first, which takes five times as long. What stands for
    pictures, such as their features (D), becomes (B, D).
    """
    if pictures[0].ndim != 3:
        return torch.stack(list(pictures))
    return torch.stack([picture.permute(1, 2, 0) for picture in pictures]).permute(0, 3, 1, 2)


def _reason(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror:
        return error.strerror.lower()
    return str(error).split(" <_io.")[0].strip() or type(error).__name__


def _upright_rgb(image: Image.Image) -> Image.Image:
    image.load()
    image = _to_8_bits(_upright(image))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(white, image).convert("RGB")
    return image.convert("RGB")


def _upright(image: Image.Image) -> Image.Image:
    try:
        return ImageOps.exif_transpose(image)
    except Exception:  # damaged metadata is no reason to lose the picture
        return image


def _to_8_bits(image: Image.Image) -> Image.Image:
    """Scale the pixels of wider modes, which Pillow's own conversion cuts off at 255."""
    if image.mode not in ("I", "F") and not image.mode.startswith("I;16"):
        return image
    keyed = image.info.get("transparency")  # a value, which is not scaled with the others
    wide = image.convert("F")
    _, brightest = wide.getextrema()
    assert isinstance(brightest, float)
    if image.mode == "F" and brightest <= 1:
        scale = 255.0
    else:
        scale = 1 / 257 if image.mode != "F" and (image.mode != "I" or brightest > 255) else 1.0
    grey = wide.point(lambda value: value * scale + 0.0).convert("L")
    grey.info.pop("transparency", None)
    if keyed is not None:
        grey.paste(255, mask=Image.fromarray(np.asarray(image) == keyed))
    return grey
