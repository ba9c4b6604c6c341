"""Text that fits its place in any script, and pictures of any shape in theirs."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageFont

from twotower import drawing
from twotower.drawing import Box, default_font, drawable, paste_picture, wrap, write_text

CELL = 224


def test_text_is_wrapped_and_cut() -> None:
    font = ImageFont.truetype(default_font(), 14)
    lines = wrap("one two three four five six seven eight nine ten " * 3, font, CELL, 2)
    assert len(lines) == 2
    assert lines[0].startswith("one two three")
    assert lines[1].endswith("…")
    for text in ("word " * 9, "x" * 200, "aa bb" + "犬" * 99):
        for number in (1, 2, 5):
            cut = wrap(text, font, CELL, number)
            assert len(cut) <= number
            assert all(font.getlength(line) <= CELL for line in cut)
    assert "".join(wrap("x" * 50, font, CELL, 9)) == "x" * 50
    assert wrap("short", font, CELL, 2) == ["short"]
    assert wrap("", font, CELL, 2) == []


def test_characters_that_no_font_has_are_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(drawing, "_system_fonts", lambda: [])
    assert drawable("a dog 浜辺 runs", 14)[0] == "a dog runs"
    assert drawable("Ünïcödé λ Ж", 14)[0] == "Ünïcödé λ Ж"
    assert drawable("浜辺を走る犬", 14)[0] == ""


def test_a_font_of_the_machine_is_taken_if_it_has_the_characters(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    default = default_font()
    other = str(Path(default).with_name("DejaVuSerif.ttf"))
    (tmp_path / "broken.ttf").write_bytes(b"no font")
    known = drawing._characters
    monkeypatch.setattr(
        drawing,
        "_characters",
        lambda file: known(file) | ({ord("犬")} if file == other else frozenset()),
    )
    fonts = [str(tmp_path / "broken.ttf"), default, other]
    monkeypatch.setattr(drawing, "_system_fonts", lambda: fonts)
    text, font = drawable("dog 犬", 14)
    assert (text, font.path) == ("dog 犬", other)
    assert drawable("dog", 14)[1].path == default


def test_no_font_that_draws_boxes_for_everything_is_used() -> None:
    assert not any("LastResort" in Path(file).name for file in drawing._system_fonts())


def painted(sheet: Image.Image) -> tuple[int, int, int, int]:
    """The first and last column and row that are not white: left, top, right, bottom."""
    dark = (np.array(sheet) < 250).any(2)
    rows, columns = np.flatnonzero(dark.any(1)), np.flatnonzero(dark.any(0))
    return columns[0], rows[0], columns[-1], rows[-1]


@pytest.mark.parametrize("words", [5, 40, 400])
@pytest.mark.parametrize("align", ["left", "center", "right"])
def test_text_stays_in_its_box(words: int, align: str) -> None:
    sheet = Image.new("RGB", (300, 200), "white")
    box = Box(40, 30, 200, 100)
    text = " ".join(f"word{i}" for i in range(words))
    write_text(ImageDraw.Draw(sheet), box, text, 14, align=align, middle=True)
    left, top, right, bottom = painted(sheet)
    assert box.left <= left and right <= box.left + box.width
    assert box.top <= top and bottom <= box.top + box.height
    if words == 5 and align == "center":
        assert abs((top + bottom) / 2 - (box.top + box.height / 2)) < 10


def test_a_text_that_no_font_can_show_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(drawing, "_system_fonts", lambda: [])
    sheets = [Image.new("RGB", (300, 30), "white") for _ in range(2)]
    box = Box(0, 0, 300, 30)
    write_text(ImageDraw.Draw(sheets[0]), box, "浜辺を走る犬", 14)
    write_text(ImageDraw.Draw(sheets[1]), box, drawing.NO_FONT, 14, drawing.FAINT)
    assert sheets[0] == sheets[1]


@pytest.mark.parametrize("size", [(8, 8), (400, 300), (1, 3000), (3000, 1), (5, 900)])
def test_a_picture_of_any_shape_fills_its_box_in_one_direction(
    size: tuple[int, int], tmp_path: Path
) -> None:
    Image.new("RGB", size, (200, 0, 0)).save(tmp_path / "a.png")
    sheet = Image.new("RGB", (300, 300), "white")
    paste_picture(sheet, Box(50, 60, 100, 80), tmp_path / "a.png")
    left, top, right, bottom = painted(sheet)
    assert left >= 50 and right < 150 and top >= 60 and bottom < 140
    width, height = right - left + 1, bottom - top + 1
    assert width == 100 or height == 80
    expected = size[0] / size[1]
    assert width / height == pytest.approx(expected, rel=0.05) or min(width, height) == 1


def test_a_transparent_picture_lies_on_white_and_what_it_leaves_is_the_ground(
    tmp_path: Path,
) -> None:
    Image.new("RGBA", (40, 20), (0, 0, 0, 0)).save(tmp_path / "a.png")
    sheet = Image.new("RGB", (100, 100), "black")
    paste_picture(sheet, Box(0, 0, 100, 100), tmp_path / "a.png", ground="#112233")
    pixels = np.array(sheet)
    assert pixels[50, 50].tolist() == [255] * 3
    assert pixels[10, 50].tolist() == [0x11, 0x22, 0x33]
