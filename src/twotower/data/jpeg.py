"""JPEG files by libjpeg-turbo itself, at a fraction of their size where that is enough."""

from __future__ import annotations

import io

import numpy as np
import numpy.typing as npt
from PIL import Image

from twotower.decoded import Decoded

Pixels = npt.NDArray[np.uint8]

# Coloured or grey; four inks are left to Pillow, which knows Adobe's inverted ones.
_SPACES = ("YCbCr", "RGB", "Gray")
# What a file that asks to be turned must hold, in EXIF or in XMP.
_TURNED = (b"Exif\x00\x00", b"tiff:Orientation")
_ORIENTATION = 0x0112


def is_jpeg(data: bytes) -> bool:
    """Whether bytes begin as a JPEG file does."""
    return data.startswith(b"\xff\xd8\xff")


def decode_jpeg(data: bytes, side: int = 0) -> Decoded | None:
    """Decode a JPEG file; None for what is left to Pillow: four inks, damage, suspicious sizes.

    Args:
        side: pixels that the shorter side must keep: the discrete cosine transform is inverted at
            the smallest eighths that do. 0 decodes in full.
    """
    import simplejpeg

    try:
        height, width, space, _ = simplejpeg.decode_jpeg_header(data)
        if space not in _SPACES or height * width > (Image.MAX_IMAGE_PIXELS or 0):
            return None
        turn = _orientation(data)
        pixels: Pixels = simplejpeg.decode_jpeg(data, "RGB", min_height=side, min_width=side)
    except ValueError:  # also for damage that Pillow overlooks: it decides
        return None
    pixels = _turned(pixels, turn)
    return Decoded(pixels, (width, height) if turn >= 5 else (height, width))


def _orientation(data: bytes) -> int:
    """1 to 8, as EXIF numbers them; 1 is upright."""
    if not any(mark in data for mark in _TURNED):
        return 1
    try:
        found = Image.open(io.BytesIO(data)).getexif().get(_ORIENTATION, 1)
    except Exception:  # damaged metadata is no reason to lose the picture
        return 1
    return found if isinstance(found, int) and 1 <= found <= 8 else 1


def _turned(pixels: Pixels, orientation: int) -> Pixels:
    """Upright; 2, 4, 5 and 7 are mirrored, from 5 on height and width change places."""
    if orientation >= 5:
        pixels = pixels.transpose(1, 0, 2)
    if orientation in (3, 4, 7, 8):
        pixels = pixels[::-1]
    if orientation in (2, 3, 6, 7):
        pixels = pixels[:, ::-1]
    return np.ascontiguousarray(pixels)
