"""Pictures of pictures and text: what the grid of a search and the figures of a run share."""

from __future__ import annotations

import math
from bisect import bisect_right
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from twotower.data.images import decode_image

INK, FAINT, PAPER, EMPTY = "#1a1a1a", "#6b6b6b", "white", "#e8e8e8"
NO_FONT = "(no font has these characters)"
LONGEST = 1000  # characters of a text that are looked at
TALLER = 1.3  # line height over font size


@dataclass(frozen=True)
class Box:
    """A place on a sheet, in pixels."""

    left: int
    top: int
    width: int
    height: int

    @property
    def corners(self) -> tuple[int, int, int, int]:
        """Its first and last pixel, as Pillow's drawing takes them."""
        return (self.left, self.top, self.left + self.width - 1, self.top + self.height - 1)


def line_height(size: int) -> int:
    """Pixels from one line to the next of text of a size."""
    return round(size * TALLER)


def text_width(text: str, size: int) -> int:
    """Pixels that a text takes on one line."""
    shown, font = drawable(text, size)
    return math.ceil(font.getlength(shown))


def write_text(
    draw: ImageDraw.ImageDraw,
    box: Box,
    text: str,
    size: int,
    colour: str = INK,
    *,
    align: str = "left",
    middle: bool = False,
) -> None:
    """Draw text wrapped to a box, cut with an ellipsis where the box ends.

    Args:
        size: of the font, in pixels.
        align: left, center or right.
        middle: in the middle of the box's height, not at its top.
    """
    words = " ".join(text[:LONGEST].split())
    shown, font = drawable(words, size)
    if words and not shown:
        shown, colour = NO_FONT, FAINT
    step = line_height(size)
    lines = wrap(shown, font, box.width, max(1, box.height // step))
    top = box.top + (max(0, box.height - len(lines) * step) // 2 if middle else 0)
    for number, line in enumerate(lines):
        room = box.width - font.getlength(line)
        left = box.left + {"left": 0.0, "center": room / 2, "right": room}[align]
        draw.text((left, top + number * step), line, fill=colour, font=font)


def paste_picture(sheet: Image.Image, box: Box, path: Path, ground: str = PAPER) -> None:
    """Draw a picture file as large as it fits into the middle of a box.

    What it leaves free is of the colour `ground`; an unreadable one leaves a grey place.
    """
    draw = ImageDraw.Draw(sheet)
    draw.rectangle(box.corners, fill=ground)
    try:
        picture = decode_image(path)
    # Decoders fail on broken files in ways that nobody has listed; the other pictures stay.
    except Exception:
        draw.rectangle(box.corners, fill=EMPTY)
        write_text(draw, box, "unreadable", 14, FAINT, align="center", middle=True)
        return
    scale = min(box.width / picture.width, box.height / picture.height)
    width, height = (max(1, round(side * scale)) for side in picture.size)
    fitted = picture.resize((width, height), Image.Resampling.LANCZOS, reducing_gap=3.0)
    left, top = box.left + (box.width - width) // 2, box.top + (box.height - height) // 2
    sheet.paste(fitted, (left, top))


def wrap(text: str, font: ImageFont.FreeTypeFont, width: int, max_lines: int) -> list[str]:
    """Lines of at most `width` pixels, broken at spaces or, without any, between characters."""
    lines: list[str] = []
    rest = text
    while rest and len(lines) < max_lines:
        last = len(lines) == max_lines - 1
        fits = _fitting(rest, "", font, width)
        if fits < len(rest) and last:
            lines.append(rest[: _fitting(rest, "…", font, width)].rstrip() + "…")
            break
        space = rest.rfind(" ", 0, fits + 1)
        cut = fits if fits == len(rest) or space < 1 else space
        lines.append(rest[:cut].rstrip())
        rest = rest[cut:].lstrip()
    return lines


def _fitting(text: str, end: str, font: ImageFont.FreeTypeFont, width: int) -> int:
    """How many characters of a text fit into `width` pixels with `end` behind them; at least 1."""

    def length(count: int) -> float:
        return font.getlength(text[:count] + end)

    fits = bisect_right(range(1, len(text) + 1), float(width), key=length)
    while fits > 1 and length(fits) > width:  # kerning and marks: not always longer by a character
        fits -= 1
    return max(1, fits)


def drawable(text: str, size: int) -> tuple[str, ImageFont.FreeTypeFont]:
    """The text and a font that has its characters; what no font has is left out, not boxed."""
    default = default_font()
    needed = frozenset(ord(c) for c in text if c != " ")
    if needed <= _characters(default):
        return text, ImageFont.truetype(default, size)
    for font_file in _system_fonts():
        if needed <= _characters(font_file):
            return text, ImageFont.truetype(font_file, size)
    known = _characters(default)
    shown = "".join(c if c == " " or ord(c) in known else " " for c in text)
    return " ".join(shown.split()), ImageFont.truetype(default, size)


@lru_cache(maxsize=1)
def default_font() -> str:
    """DejaVu Sans, which matplotlib brings: Latin, Greek, Cyrillic, Arabic and more."""
    import matplotlib

    return str(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf")


@lru_cache(maxsize=1)
def _system_fonts() -> list[str]:
    """The scalable fonts of the machine, plain ones first."""
    from matplotlib.font_manager import fontManager

    usable = [
        entry
        for entry in fontManager.ttflist
        # Last Resort claims every character and draws a box for it.
        if not entry.name.startswith("Last Resort") and entry.size == "scalable"
    ]
    usable.sort(key=lambda entry: (entry.style != "normal", "Sans" not in entry.name, entry.name))
    return [entry.fname for entry in usable]


@lru_cache(maxsize=256)
def _characters(font_file: str) -> frozenset[int]:
    """The characters that a font has; none if the file cannot be used."""
    from matplotlib.ft2font import FT2Font

    try:
        ImageFont.truetype(font_file, 12)
        return frozenset(FT2Font(font_file).get_charmap())
    except (OSError, RuntimeError):
        return frozenset()
