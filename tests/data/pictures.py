"""Pictures of one colour, as bytes."""

from __future__ import annotations

import io

from PIL import Image


def png(colour: tuple[int, int, int]) -> bytes:
    """A PNG file of 4 by 4 pixels."""
    buffer = io.BytesIO()
    Image.new("RGB", (4, 4), colour).save(buffer, "PNG")
    return buffer.getvalue()
