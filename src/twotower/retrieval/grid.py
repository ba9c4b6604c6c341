"""The results of a query as one picture: a grid with rank, score and caption under each."""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from twotower.checkpoint.atomic import replacing
from twotower.data.images import decode_image
from twotower.retrieval.searcher import Hit

COLUMNS = 5
CELL = 224  # pixels: width and height of a picture's place
GAP = 12
LINE = 18
CAPTION_LINES = 2
TITLE = 44
NAME_BYTES = 120

INK, FAINT, PAPER, EMPTY = "#1a1a1a", "#6b6b6b", "white", "#e8e8e8"


def picture_name(query: str) -> str:
    """The file name of a query's picture: the query as typed, and `.png`.

    Only `/`, control characters and a leading dot become `_`; cut at 120 bytes, at a character.
    """
    safe = "".join("_" if c == "/" or unicodedata.category(c) == "Cc" else c for c in query)
    if safe.startswith("."):
        safe = "_" + safe[1:]
    return safe.encode()[:NAME_BYTES].decode(errors="ignore") + ".png"


def write_grid(hits: Sequence[Hit], title: str, path: Path) -> None:
    """Draw the hits of one query to a PNG file; an unreadable picture leaves a grey place.

    Raises:
        ConfigError: the file cannot be written.
    """
    columns = max(1, min(COLUMNS, len(hits)))
    rows = -(-len(hits) // columns)
    cell_height = CELL + (1 + CAPTION_LINES) * LINE + GAP
    # A title needs some width even over a single picture.
    width = max(GAP + columns * (CELL + GAP), 3 * CELL)
    sheet = Image.new("RGB", (width, TITLE + rows * cell_height + GAP), PAPER)
    draw = ImageDraw.Draw(sheet)
    _write(draw, (GAP, GAP), title, 20, INK, width - 2 * GAP, 1)
    for number, hit in enumerate(hits):
        left = GAP + number % columns * (CELL + GAP)
        top = TITLE + number // columns * cell_height
        _paste(sheet, draw, hit.path, left, top)
        text_top = top + CELL + 2
        _write(draw, (left, text_top), f"{hit.rank}  ·  {hit.score:.4f}", 14, FAINT, CELL, 1)
        _write(draw, (left, text_top + LINE), hit.caption, 14, INK, CELL, CAPTION_LINES)
    with replacing(path) as temporary:
        sheet.save(temporary, format="PNG")


def _paste(sheet: Image.Image, draw: ImageDraw.ImageDraw, path: Path, left: int, top: int) -> None:
    try:
        picture = decode_image(path)
        picture.thumbnail((CELL, CELL))
    # Decoders fail on broken files in ways that nobody has listed; the other results stay.
    except Exception:
        draw.rectangle((left, top, left + CELL - 1, top + CELL - 1), fill=EMPTY)
        _write(draw, (left + GAP, top + CELL // 2 - LINE), "unreadable", 14, FAINT, CELL, 1)
        return
    sheet.paste(picture, (left + (CELL - picture.width) // 2, top + (CELL - picture.height) // 2))


def _write(
    draw: ImageDraw.ImageDraw,
    corner: tuple[int, int],
    text: str,
    size: int,
    colour: str,
    width: int,
    max_lines: int,
) -> None:
    """Draw text wrapped to `width` pixels, cut with an ellipsis after `max_lines`."""
    shown, font = _drawable(" ".join(text[:400].split()), size)
    for number, line in enumerate(wrap(shown, font, width, max_lines)):
        draw.text((corner[0], corner[1] + number * LINE), line, fill=colour, font=font)


def wrap(text: str, font: ImageFont.FreeTypeFont, width: int, max_lines: int) -> list[str]:
    """Lines of at most `width` pixels, broken at spaces or, without any, between characters."""
    lines: list[str] = []
    rest = text
    while rest and len(lines) < max_lines:
        last = len(lines) == max_lines - 1
        fits = len(rest)
        while fits > 1 and font.getlength(rest[:fits]) > width:
            fits -= 1
        if fits < len(rest) and last:
            while fits > 1 and font.getlength(rest[:fits] + "…") > width:
                fits -= 1
            lines.append(rest[:fits].rstrip() + "…")
            break
        space = rest.rfind(" ", 0, fits + 1)
        cut = fits if fits == len(rest) or space < 1 else space
        lines.append(rest[:cut].rstrip())
        rest = rest[cut:].lstrip()
    return lines


def _drawable(text: str, size: int) -> tuple[str, ImageFont.FreeTypeFont]:
    """The text and a font that has its characters; what no font has is left out, not boxed."""
    default = _default_font()
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
def _default_font() -> str:
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
