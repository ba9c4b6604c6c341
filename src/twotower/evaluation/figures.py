"""What a model sees, drawn at each validation: a matrix of cosines, and a sheet of matches."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw
from torch import Tensor

from twotower.checkpoint.atomic import replacing
from twotower.config import EvaluateConfig
from twotower.data.images import UnreadableImage, decode_image
from twotower.data.pairs import PairTable
from twotower.drawing import (
    EMPTY,
    FAINT,
    INK,
    PAPER,
    Box,
    line_height,
    paste_picture,
    text_width,
    write_text,
)
from twotower.evaluation.features import PairFeatures
from twotower.evaluation.matches import (
    Found,
    Match,
    choose_captions,
    cosines,
    distinct_pairs,
    find_matches,
)
from twotower.tracking import MetricWriter

PAIRS = 8  # of the matrix: 8 x 8
GAP = 12  # pixels, as all that follow
PICTURE = 116
CAPTION = 380  # width of a caption: 40 words take five or six lines
TEXT, VALUE, TITLE = 14, 17, 19
LINE = line_height(TEXT)
HEAD = GAP + line_height(TITLE) + 2 * LINE + GAP
THICK, THIN = 5, 2
RIGHT, WRONG, GROUND, EDGE = "#1a9641", "#d7301f", "#f4f4f4", "#d8d8d8"


def draw_figures(
    features: PairFeatures,
    pairs: PairTable,
    config: EvaluateConfig,
    seed: int,
    folder: Path,
    writer: MetricWriter,
    step: int,
) -> None:
    """Draw both figures to `folder`, TensorBoard and W&B; the first rank alone calls it.

    The captions are drawn by `seed`, so figures of one run can be laid beside each other.

    Raises:
        ConfigError: the folder cannot be written, or the disk is full.
    """
    eight = distinct_pairs(features.owner, PAIRS, seed)
    matrix = draw_matrix(
        cosines(features, eight),
        [features.captions[number] for number in eight],
        [pairs.path(int(features.rows[features.owner[number]])) for number in eight],
        f"{pairs.name}, step {step:,}: cosines of captions and pictures",
    )
    chosen = choose_captions(features.owner, config.max_sentences, seed)
    matches = find_matches(features, pairs, chosen, config.max_matches)
    sheet = draw_matches(
        matches, len(features.images), f"{pairs.name}, step {step:,}: what captions find"
    )
    for name, picture in (("matrix", matrix), ("matches", sheet)):
        with replacing(folder / f"{name}-{step:06d}.png") as temporary:
            picture.save(temporary, format="PNG")
        writer.image(f"figures/{name}", np.asarray(picture), step)
    if writer.takes_tables:
        writer.table("figures/match_table", *match_table(matches), step)


def draw_matrix(
    scores: Tensor, captions: Sequence[str], paths: Sequence[Path], title: str
) -> Image.Image:
    """Captions (rows) against their pictures (columns): the cosine in each cell, as text and shade.

    Args:
        scores: (n, n) cosines; the diagonal is each caption with its own picture.
    """
    count = len(captions)
    place = PICTURE + 4
    left, top = GAP + CAPTION + GAP, HEAD + GAP + place
    sheet = Image.new("RGB", (left + count * place + GAP, top + count * place + GAP), PAPER)
    best = scores.argmax(1).tolist()
    own_best = sum(column == row for row, column in enumerate(best))
    low, high = _range(scores)
    _head(
        sheet,
        title,
        f"{own_best} of {count} captions are nearest to their own picture; "
        f"shades from {low:.3f} to {high:.3f}",
        [
            (RIGHT, THICK, "its own picture, and the nearest"),
            (WRONG, THICK, "its own picture, but another is nearer"),
            (INK, THIN, "the nearest, and not its own"),
        ],
    )
    draw = ImageDraw.Draw(sheet)
    for column, path in enumerate(paths):
        _picture(sheet, Box(left + column * place + 2, HEAD + GAP, PICTURE, PICTURE), path)
    for row, caption in enumerate(captions):
        y = top + row * place
        write_text(draw, Box(GAP, y + 2, CAPTION, PICTURE), caption, TEXT, middle=True)
        for column in range(count):
            cell = Box(left + column * place + 2, y + 2, PICTURE, PICTURE)
            _cell(draw, cell, float(scores[row, column]), low, high)
            if row == column:
                _frame(draw, cell, RIGHT if best[row] == row else WRONG, THICK)
            elif column == best[row]:
                _frame(draw, cell, INK, THIN)
    return sheet


def _range(scores: Tensor) -> tuple[float, float]:
    finite = scores[scores.isfinite()]
    return (float(finite.min()), float(finite.max())) if len(finite) else (0.0, 0.0)


def _cell(draw: ImageDraw.ImageDraw, box: Box, score: float, low: float, high: float) -> None:
    """A cosine on its shade of blue; grey if it is no number."""
    colour = EMPTY
    if math.isfinite(score):
        colour = _blue((score - low) / (high - low) if high > low else 0.5)
    draw.rectangle(box.corners, fill=colour)
    write_text(draw, box, f"{score:.3f}", VALUE, align="center", middle=True)


def _blue(share: float) -> str:
    """From nearly white (0) to a blue that black text can still be read on (1)."""
    light, dark = (247, 250, 253), (93, 165, 218)
    mixed = (round(a + (b - a) * share) for a, b in zip(light, dark, strict=True))
    return "#" + "".join(f"{value:02x}" for value in mixed)


def draw_matches(matches: Sequence[Match], images: int, title: str) -> Image.Image:
    """A row a caption: the pictures it finds, nearest first, its own one framed.

    Where its own picture is not among them it follows behind a line, with its rank.

    Args:
        images: how many pictures there are to find.
    """
    columns = max((len(match.found) for match in matches), default=0)
    place = PICTURE + GAP
    left, own_left = GAP + CAPTION + GAP, GAP + CAPTION + GAP + columns * place + 2 * GAP
    row_height = PICTURE + THICK + LINE + GAP
    top = HEAD + LINE + GAP
    size = (own_left + place, top + len(matches) * row_height + GAP)
    sheet = Image.new("RGB", size, PAPER)
    ranks = [match.rank for match in matches]
    _head(
        sheet,
        title,
        f"of {len(matches)} captions, {sum(r <= 1 for r in ranks)} find their own picture first "
        f"and {sum(r <= columns for r in ranks)} among the first {columns}, of {images:,} pictures",
        [
            (RIGHT, THICK, "its own picture"),
            (RIGHT, THIN, "another with the same caption"),
            (WRONG, THICK, "its own picture, found too late"),
        ],
    )
    draw = ImageDraw.Draw(sheet)
    for column in range(columns):
        above = Box(left + column * place, HEAD, PICTURE, LINE)
        write_text(draw, above, str(column + 1), TEXT, FAINT, align="center")
    above = Box(own_left, HEAD, PICTURE, LINE)
    write_text(draw, above, "its own picture", TEXT, FAINT, align="center")
    for number, match in enumerate(matches):
        y = top + number * row_height
        draw.line((GAP, y - GAP // 2 - 2, size[0] - GAP, y - GAP // 2 - 2), fill=EMPTY)
        write_text(draw, Box(GAP, y, CAPTION, PICTURE), match.caption, TEXT, middle=True)
        for column, found in enumerate(match.found):
            box = Box(left + column * place, y, PICTURE, PICTURE)
            _found(sheet, box, found, f"{found.score:.3f}", RIGHT)
        if match.rank > len(match.found):
            box = Box(own_left, y, PICTURE, PICTURE)
            x = own_left - 3 * GAP // 2
            draw.line((x, y, x, y + PICTURE), fill=FAINT)
            _found(sheet, box, match.own, f"{match.own.score:.3f}, rank {match.rank:,}", WRONG)
    return sheet


def _found(sheet: Image.Image, box: Box, found: Found, text: str, colour: str) -> None:
    """A picture with its score below, framed if it is right."""
    _picture(sheet, box, found.path)
    draw = ImageDraw.Draw(sheet)
    if found.own or found.same:
        _frame(draw, box, colour, THICK if found.own else THIN)
    below = Box(box.left - GAP // 2, box.top + box.height + THICK, box.width + GAP, LINE)
    write_text(draw, below, text, TEXT, colour if found.own else FAINT, align="center")


def _picture(sheet: Image.Image, box: Box, path: Path) -> None:
    """A picture with a faint edge, so that a white one is seen too."""
    paste_picture(sheet, box, path, GROUND)
    _frame(ImageDraw.Draw(sheet), box, EDGE, 1)


def _frame(draw: ImageDraw.ImageDraw, box: Box, colour: str, width: int) -> None:
    """A frame just outside a box, so that nothing of the picture is hidden."""
    left, top, right, bottom = box.corners
    outer = (left - width + 1, top - width + 1, right + width - 1, bottom + width - 1)
    draw.rectangle(outer, outline=colour, width=width)


def _head(
    sheet: Image.Image, title: str, facts: str, legend: Sequence[tuple[str, int, str]]
) -> None:
    """Title, a line of facts, and a line that says what the frames mean."""
    draw = ImageDraw.Draw(sheet)
    width = sheet.width - 2 * GAP
    write_text(draw, Box(GAP, GAP, width, line_height(TITLE)), title, TITLE)
    top = GAP + line_height(TITLE)
    write_text(draw, Box(GAP, top, width, LINE), facts, TEXT, FAINT)
    left, top = GAP, top + LINE + GAP // 2
    for colour, thickness, text in legend:
        _frame(draw, Box(left + THICK, top + 6, 10, 7), colour, min(thickness, 4))
        left += 10 + 3 * THICK
        width = text_width(text, TEXT)
        write_text(draw, Box(left, top, width, LINE), text, TEXT, FAINT)
        left += width + 2 * GAP


def match_table(matches: Sequence[Match]) -> tuple[list[str], list[list[object]]]:
    """The same as columns and rows: caption, rank, its own picture, and the pictures found."""
    count = max((len(match.found) for match in matches), default=0)
    columns = ["caption", "rank", "own picture", *(f"match {k + 1}" for k in range(count))]
    rows: list[list[object]] = []
    for match in matches:
        pictures = [_thumbnail(found.path) for found in (match.own, *match.found)]
        rows.append([match.caption, match.rank, *pictures])
    return columns, rows


def _thumbnail(path: Path) -> Image.Image | None:
    try:
        picture = decode_image(path)
    except UnreadableImage:
        return None
    picture.thumbnail((2 * PICTURE, 2 * PICTURE))
    return picture
