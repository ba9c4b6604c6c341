"""One picture file: whether it can be decoded whole, what kind it is, its hashes and a thumb."""

from __future__ import annotations

import re
import warnings
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from PIL import Image, UnidentifiedImageError

from twotower.data.heif import open_image, why_unknown
from twotower.data.images import UnreadableImage, decode_image
from twotower.data.jpeg import orientation_of, turbo, upright
from twotower.data.places import read_bytes, state_of
from twotower.quality.jpeg import damage

SIDE, COLOUR_SIDE = 32, 8  # of a thumb's luminance, and of each of its colour planes
THUMB = SIDE**2 + 2 * COLOUR_SIDE**2  # bytes
DECODED = 128  # a large JPEG is decoded at the smallest scale with this side or more
BLANK = 3.0  # standard deviation of luminance in levels, below which there is nothing to compare
MODES = {"CMYK": "cmyk", "P": "palette", "PA": "palette", "L": "greyscale", "LA": "greyscale"}


@dataclass(frozen=True)
class Limits:
    """What is too large to decode and what is tiny, in pixels."""

    max_pixels: int
    min_side: int


class Inspected(NamedTuple):
    """What a file turned out to be.

    `fault` is empty where all of it decodes. `thumb` holds `THUMB` bytes: luminance (32, 32), Cb
    and Cr (8, 8), upright; None where there is a fault. Hashes are 16 bytes, of the file, and of
    the pixels as decoded together with the picture's size.
    """

    size: int = 0
    mtime_ns: int = 0
    fault: str = ""
    reason: str = ""
    format: str = ""
    width: int = 0
    height: int = 0
    traits: tuple[str, ...] = ()
    bytes_hash: bytes | None = None
    pixels_hash: bytes | None = None
    thumb: bytes | None = None


class _Fault(Exception):
    def __init__(self, kind: str, reason: str) -> None:
        super().__init__(reason)
        self.kind = kind


def inspect(path: Path, limits: Limits) -> Inspected:
    """Read a file, decode all of it, and say what it is; nothing that it holds raises.

    Every byte of the picture goes through its decoder, since a truncated file looks well until its
    end. JPEGs are decoded at a reduced scale where that is still 128 pixels or more: this saves
    the transforms but none of the entropy decoding.
    """
    try:
        state = state_of(path)
        data = read_bytes(path)
    except OSError as error:
        return Inspected(fault="unreadable", reason=(error.strerror or str(error)).lower())
    known: dict[str, Any] = state._asdict()
    known["bytes_hash"] = blake2b(data, digest_size=16).digest()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            orientation = _header(data, limits, known)
            pixels = _pixels(data, known["format"], known.pop("mode"), orientation)
    except _Fault as fault:
        known.pop("mode", None)
        return Inspected(**{**known, "fault": fault.kind, "reason": str(fault)})
    known["pixels_hash"] = _pixels_hash(pixels, known["width"], known["height"])
    known["thumb"] = make_thumb(pixels)
    luminance = np.frombuffer(known["thumb"], np.uint8, SIDE**2)
    if luminance.std() < BLANK:
        known["traits"] = (*known["traits"], "blank")
    return Inspected(**known)


def _header(data: bytes, limits: Limits, known: dict[str, Any]) -> int:
    """Fill in what the header says without decoding; the EXIF orientation."""
    if not data:
        raise _Fault("unreadable", "the file is empty")
    try:
        with open_image(data) as image:
            width, height = image.size
            known.update(format=image.format or "", width=width, height=height, mode=image.mode)
            if width * height > limits.max_pixels:
                raise _Fault("huge", f"{width} x {height} pixels: refused without decoding")
            orientation = orientation_of(image)
            known["traits"] = tuple(_traits(image, orientation, limits))
            return orientation
    except _Fault:
        raise
    except Image.DecompressionBombError as error:
        pixels = re.search(r"\d+", str(error))
        count = f"{int(pixels[0]):,}" if pixels else "too many"
        raise _Fault("huge", f"{count} pixels: refused without decoding") from error
    except Exception as error:  # damaged headers leave Pillow by any exception there is
        unknown = isinstance(error, UnidentifiedImageError)
        reason = why_unknown(data) if unknown else str(error)
        raise _Fault("unreadable", reason or type(error).__name__) from error


def _traits(image: Image.Image, orientation: int, limits: Limits) -> list[str]:
    traits = []
    if min(image.size) < limits.min_side:
        traits.append("tiny")
    if image.mode in MODES:
        traits.append(MODES[image.mode])
    elif image.mode in ("I", "F") or image.mode.startswith("I;16"):
        traits.append("16-bit")
    if image.has_transparency_data:
        traits.append("alpha")
    if orientation != 1:
        traits.append("exif_rotated")
    # An MPO file is a photograph of a phone with a second view behind it.
    if image.format != "MPO" and getattr(image, "is_animated", False):
        traits.append("animated")
    return traits


def _pixels(data: bytes, kind: str, mode: str, orientation: int) -> npt.NDArray[np.uint8]:
    """The upright picture, uint8 (h, w, 3); a JPEG perhaps at a reduced scale."""
    if kind in ("JPEG", "MPO") and mode in ("L", "RGB"):
        pixels = _jpeg(data)
        if pixels is not None:
            return upright(pixels, orientation)
    try:
        return np.asarray(decode_image(data))
    except UnreadableImage as error:
        raise _Fault(*_classified(str(error))) from error


def _jpeg(data: bytes) -> npt.NDArray[np.uint8] | None:
    """A JPEG by libjpeg-turbo with its warnings as faults; None for one that it does not know."""
    try:
        pixels = turbo(data, DECODED)
        if unseen := damage(data):
            raise _Fault("damaged", unseen)
        return pixels
    except ValueError as error:
        complaint = str(error)
    kind, reason = _classified(complaint)
    if kind == "truncated":
        raise _Fault(kind, reason)
    try:
        decode_image(data)
    except UnreadableImage as error:
        raise _Fault(*_classified(str(error))) from error
    if "corrupt" in complaint.lower() or "inconsistent" in complaint.lower():
        raise _Fault("damaged", complaint)
    return None


def _classified(reason: str) -> tuple[str, str]:
    cut = any(word in reason.lower() for word in ("truncated", "premature end", "end of file"))
    return ("truncated" if cut else "unreadable"), reason


def _pixels_hash(pixels: npt.NDArray[np.uint8], width: int, height: int) -> bytes:
    digest = blake2b(f"{width}x{height}".encode(), digest_size=16)
    digest.update(np.ascontiguousarray(pixels).data)
    return digest.digest()


def make_thumb(pixels: npt.NDArray[np.uint8]) -> bytes:
    """What near duplicates are found by: luminance (32, 32), then Cb and Cr (8, 8), as bytes."""
    image = Image.fromarray(pixels)
    kind = Image.Resampling.BOX if min(image.size) >= SIDE else Image.Resampling.BILINEAR
    small = image.resize((SIDE, SIDE), kind).convert("YCbCr")
    luminance = np.asarray(small)[:, :, 0]
    tiny = np.asarray(small.resize((COLOUR_SIDE, COLOUR_SIDE), Image.Resampling.BOX))
    return luminance.tobytes() + tiny[:, :, 1].tobytes() + tiny[:, :, 2].tobytes()
