"""What a file is: each fault and each trait, and what stays equal however a picture is stored."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.quality.pictures import LIMITS, encoded, photograph
from twotower.quality import picture
from twotower.quality.jpeg import damage
from twotower.quality.picture import SIDE, THUMB, Inspected, inspect


@pytest.fixture
def look(tmp_path: Path):  # noqa: ANN201
    def looked(data: bytes) -> Inspected:
        path = tmp_path / "picture"
        path.write_bytes(data)
        return inspect(path, LIMITS)

    return looked


WHOLE = encoded(photograph(1))
HALF = len(WHOLE) // 2


def test_whole_picture_has_no_fault(look) -> None:
    seen = look(WHOLE)
    assert (seen.fault, seen.reason, seen.traits) == ("", "", ())
    assert (seen.format, seen.width, seen.height, seen.size) == ("JPEG", 160, 120, len(WHOLE))
    assert len(seen.thumb) == THUMB


@pytest.mark.parametrize(
    ("data", "fault"),
    [
        (b"", "unreadable"),
        (b"<html>404</html>", "unreadable"),
        (WHOLE[:60], "unreadable"),
        (b"\0" * 40 + WHOLE[40:], "unreadable"),
        (WHOLE[:HALF], "truncated"),
        (WHOLE[:-2], "truncated"),
        (WHOLE[:HALF] + bytes(HALF), "truncated"),
        (WHOLE[:HALF] + b"\xff\x37" + WHOLE[HALF:], "damaged"),
        (WHOLE[:HALF] + bytes(100) + WHOLE[HALF + 100 :], "damaged"),
        (encoded(photograph(1), "PNG")[:2000], "truncated"),
        (encoded(Image.new("1", (1001, 1000)), "PNG"), "huge"),
    ],
)
def test_faults(look, data: bytes, fault: str) -> None:
    seen = look(data)
    if fault == "damaged":  # how far a decoder comes with corrupt data is its own affair
        assert seen.fault in ("damaged", "unreadable", "truncated")
    else:
        assert seen.fault == fault
    assert seen.reason
    assert seen.thumb is None
    assert seen.pixels_hash is None


def test_missing_file_is_unreadable(tmp_path: Path) -> None:
    assert inspect(tmp_path / "none", LIMITS) == Inspected(
        fault="unreadable", reason="no such file or directory"
    )


def test_nothing_of_a_huge_picture_is_decoded(look, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(picture, "_pixels", None)
    seen = look(encoded(Image.new("1", (2000, 2000)), "PNG"))
    assert seen.reason == "2000 x 2000 pixels: refused without decoding"
    assert (seen.width, seen.height) == (2000, 2000)


def test_pillows_own_limit_is_huge_too(look, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    assert look(WHOLE).fault == "huge"


def gif() -> bytes:
    frames = [photograph(seed).quantize(64) for seed in (1, 2)]
    return encoded(frames[0], "GIF", save_all=True, append_images=frames[1:])


@pytest.mark.parametrize(
    ("data", "traits"),
    [
        (encoded(photograph(1).convert("L")), {"greyscale"}),
        (encoded(photograph(1).convert("CMYK")), {"cmyk"}),
        (encoded(photograph(1).quantize(32), "PNG"), {"palette"}),
        (encoded(photograph(1).convert("RGBA"), "PNG"), {"alpha"}),
        (encoded(photograph(1).convert("L").convert("I;16"), "PNG"), {"16-bit", "blank"}),
        (encoded(photograph(1).resize((40, 31)), "PNG"), {"tiny"}),
        (encoded(Image.new("RGB", (64, 64), "teal")), {"blank"}),
        (gif(), {"palette", "animated"}),
    ],
)
def test_traits(look, data: bytes, traits: set[str]) -> None:
    seen = look(data)
    assert (seen.fault, set(seen.traits)) == ("", traits)


TURNS = {  # what makes a picture upright, by its orientation
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


@pytest.mark.parametrize("orientation", TURNS)
def test_turned_picture_has_the_thumb_of_the_upright_one(look, orientation: int) -> None:
    image = photograph(1, 128, 128)
    exif = Image.Exif()
    exif[0x0112] = orientation
    back = {6: TURNS[8], 8: TURNS[6]}.get(orientation, TURNS[orientation])
    seen = look(encoded(image.transpose(back), quality=100, subsampling=0, exif=exif))
    assert seen.traits == ("exif_rotated",)
    upright = look(encoded(image, "PNG"))
    one, other = (np.frombuffer(s.thumb, np.uint8).astype(int) for s in (seen, upright))
    assert np.abs(one - other).max() <= 2


def test_pixels_are_equal_whatever_stands_beside_them(look) -> None:
    """A comment changes the file and no pixel; PNG and BMP hold the same pixels."""
    one, other = look(WHOLE), look(encoded(photograph(1), comment="by me"))
    assert one.bytes_hash != other.bytes_hash
    assert one.pixels_hash == other.pixels_hash
    png, bmp = (look(encoded(photograph(1), kind)) for kind in ("PNG", "BMP"))
    assert png.pixels_hash == bmp.pixels_hash != one.pixels_hash


def test_large_jpeg_is_decoded_small_and_looks_the_same(look) -> None:
    image = photograph(3, 800, 600)
    small, full = look(encoded(image)), look(encoded(image, "PNG"))
    one, other = (np.frombuffer(s.thumb, np.uint8).astype(int) for s in (small, full))
    assert np.abs(one - other)[: SIDE**2].mean() < 2


def test_damage_is_not_seen_in_whole_files() -> None:
    for options in ({}, {"progressive": True}, {"optimize": True}, {"restart_marker_rows": 1}):
        assert damage(encoded(photograph(2), **options)) == ""
    assert damage(encoded(Image.new("RGB", (500, 500), "white"), optimize=True)) == ""
    assert damage(b"\xff\xd8 and no more") == ""
