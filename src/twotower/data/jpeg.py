"""JPEG files by libjpeg-turbo itself, at a fraction of their size where that is enough."""

from __future__ import annotations

import io
from collections.abc import Iterator

import numpy as np
import numpy.typing as npt
from PIL import Image

from twotower.decoded import Decoded

Pixels = npt.NDArray[np.uint8]

# Coloured or grey; four inks are left to Pillow, which knows Adobe's inverted ones.
_SPACES = ("YCbCr", "RGB", "Gray")
_ORIENTATION = 0x0112
# Markers (ITU T.81, annex B): the compressed data begins; EXIF or XMP, which may ask for a turn.
START_OF_SCAN = 0xDA
_APP1 = 0xE1


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
        turn = _turn(data)
        if turn != 1 and (height % 8 or width % 8):
            side = 0  # a last row or column that is part of one must stay the last
        pixels = turbo(data, side)
    except ValueError:  # also for damage that Pillow overlooks: it decides
        return None
    return Decoded(upright(pixels, turn), (width, height) if turn >= 5 else (height, width))


def turbo(data: bytes, side: int = 0) -> Pixels:
    """The pixels (h, w, 3) of a JPEG file as libjpeg-turbo decodes them, not turned.

    Args:
        side: as for `decode_jpeg`.

    Raises:
        ValueError: whatever the library warns of, or that it does not know.
    """
    import simplejpeg

    pixels: Pixels = simplejpeg.decode_jpeg(data, "RGB", min_height=side, min_width=side)
    return pixels


def segments(data: bytes) -> Iterator[tuple[int, int]]:
    """The marker of each segment before the compressed data, and where the segment ends.

    Ends early where the segments make no sense; START_OF_SCAN is the last otherwise.
    """
    place, marker = 2, 0
    while marker != START_OF_SCAN and place + 4 <= len(data) and data[place] == 0xFF:
        marker = data[place + 1]
        if marker == 0xFF:  # fill
            place += 1
            continue
        place += 2 + int.from_bytes(data[place + 2 : place + 4], "big")
        yield marker, place


def _turn(data: bytes) -> int:
    """The orientation of a file, which is opened for it only where it may have one."""
    if all(marker != _APP1 for marker, _ in segments(data)):
        return 1
    try:
        return orientation_of(Image.open(io.BytesIO(data)))
    except Exception:  # damaged metadata is no reason to lose the picture
        return 1


def orientation_of(image: Image.Image) -> int:
    """1 to 8, as EXIF numbers them; 1 is upright, and what damaged metadata say."""
    try:
        found = image.getexif().get(_ORIENTATION, 1)
    except Exception:  # no reason to lose the picture
        return 1
    return found if isinstance(found, int) and 1 <= found <= 8 else 1


def upright(pixels: Pixels, orientation: int) -> Pixels:
    """Pixels (h, w, 3) turned; 2, 4, 5 and 7 are mirrored, from 5 on h and w change places."""
    if orientation >= 5:
        pixels = pixels.transpose(1, 0, 2)
    if orientation in (3, 4, 7, 8):
        pixels = pixels[::-1]
    if orientation in (2, 3, 6, 7):
        pixels = pixels[:, ::-1]
    return np.ascontiguousarray(pixels)
