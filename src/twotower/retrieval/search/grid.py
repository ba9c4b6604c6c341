"""The results of a query as one picture: a grid with rank, score and caption under each."""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from pathlib import Path

from PIL import Image, ImageDraw

from twotower.checkpoint.atomic import replacing
from twotower.drawing import FAINT, PAPER, Box, line_height, paste_picture, write_text
from twotower.retrieval.search.searcher import Hit

COLUMNS = 5
CELL = 224  # pixels: width and height of a picture's place
GAP = 12
TEXT = 14
LINE = line_height(TEXT)
CAPTION_LINES = 2
TITLE = 44
NAME_BYTES = 120


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
    write_text(draw, Box(GAP, GAP, width - 2 * GAP, line_height(20)), title, 20)
    for number, hit in enumerate(hits):
        left = GAP + number % columns * (CELL + GAP)
        top = TITLE + number // columns * cell_height
        paste_picture(sheet, Box(left, top, CELL, CELL), hit.path)
        facts = Box(left, top + CELL + 2, CELL, LINE)
        write_text(draw, facts, f"{hit.rank}  ·  {hit.score:.4f}", TEXT, FAINT)
        below = Box(left, facts.top + LINE, CELL, CAPTION_LINES * LINE)
        write_text(draw, below, hit.caption, TEXT)
    with replacing(path) as temporary:
        sheet.save(temporary, format="PNG")
