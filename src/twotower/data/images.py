"""Decoding: any picture file or bytes -> an upright RGB picture."""

from __future__ import annotations

import io
from pathlib import Path

from PIL import Image, ImageOps, UnidentifiedImageError

from twotower.data.places import read_bytes

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff")


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
        with Image.open(io.BytesIO(data)) as image:
            return _upright_rgb(image)
    except UnreadableImage:
        raise
    except UnidentifiedImageError as error:
        raise UnreadableImage("not a picture") from error
    except Image.DecompressionBombError as error:
        raise UnreadableImage("too many pixels: it could be a decompression bomb") from error
    except Exception as error:  # damaged files leave Pillow's decoders by any exception there is
        raise UnreadableImage(_reason(error)) from error


def _reason(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror:
        return error.strerror.lower()
    return str(error).split(" <_io.")[0] or type(error).__name__


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
    wide = image.convert("F")
    _, brightest = wide.getextrema()
    assert isinstance(brightest, float)
    if image.mode == "F" and brightest <= 1:
        scale = 255.0
    else:
        scale = 1 / 257 if image.mode != "F" and (image.mode != "I" or brightest > 255) else 1.0
    return wide.point(lambda value: value * scale + 0.0).convert("L")
