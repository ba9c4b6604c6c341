"""Opening picture files, HEIC and AVIF too, which not every installation can decode."""

from __future__ import annotations

import functools
import io

from PIL import AvifImagePlugin, Image, features

# What the first box of an ISO media file calls itself: HEVC pictures and sequences, AV1 ones.
_HEIC = {b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"hevm", b"hevs"}
_AVIF = {b"avif", b"avis"}
_LONGEST = 256  # bytes of that box that are looked at

# One thread a picture, not all cores: pictures are decoded side by side already.
AvifImagePlugin.DEFAULT_MAX_THREADS = 1


def open_image(data: bytes) -> Image.Image:
    """`Image.open` of a file's bytes, with HEIC where the extra `heif` is installed.

    HEIC pictures come upright: their decoder turns them and clears the orientation in their EXIF.

    Raises:
        UnidentifiedImageError: it is in no format that can be decoded; `why_unknown` says more.
    """
    if _brands(data) & _HEIC:
        _register_heic()
    return Image.open(io.BytesIO(data))


def why_unknown(data: bytes) -> str:
    """Why `open_image` could not tell what these bytes are, in a few words."""
    brands = _brands(data)
    if brands & _HEIC:
        if not _register_heic():
            return "a HEIC picture, which needs a decoder: pip install 'twotower[heif]'"
        return "a truncated or damaged HEIC picture"
    if brands & _AVIF:
        if not features.check("avif"):
            return "an AVIF picture, which this build of Pillow cannot decode"
        return "a truncated or damaged AVIF picture"
    return "not a picture"


def _brands(data: bytes) -> set[bytes]:
    """The major and the compatible brands; empty for what is no ISO media file."""
    if data[4:8] != b"ftyp":
        return set()
    end = min(int.from_bytes(data[:4], "big"), _LONGEST)
    return {data[8:12], *(data[place : place + 4] for place in range(16, end, 4))}


@functools.cache
def _register_heic() -> bool:
    """Teach Pillow HEIC, once a process; False where the extra is not installed."""
    try:
        import pillow_heif
    except ImportError:
        return False
    pillow_heif.register_heif_opener(decode_threads=1)
    return True
