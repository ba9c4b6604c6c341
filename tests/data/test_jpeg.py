"""JPEG files come from libjpeg-turbo as they come from Pillow, or are left to it."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from twotower.data.images import UnreadableImage, decode_image, decode_pixels
from twotower.data.jpeg import decode_jpeg


def photograph(width: int, height: int, mode: str = "RGB") -> Image.Image:
    y, x = np.mgrid[0:height, 0:width]
    base = 128 + 90 * np.sin(x / 17)[..., None] * np.cos(y / 23)[..., None] * [1, 0.5, -1]
    base[: height // 3, : width // 4] = [250, 20, 20]
    return Image.fromarray(base.clip(0, 255).astype(np.uint8)).convert(mode)


def encoded(image: Image.Image, **options: object) -> bytes:
    stream = io.BytesIO()
    image.save(stream, "JPEG", **options)
    return stream.getvalue()


@pytest.mark.parametrize("subsampling", [0, 1, 2])
@pytest.mark.parametrize("progressive", [False, True])
@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_pixels_are_those_of_pillow(mode: str, progressive: bool, subsampling: int) -> None:
    options: dict[str, object] = {"quality": 87, "progressive": progressive}
    if mode == "RGB":
        options["subsampling"] = subsampling
    data = encoded(photograph(83, 61, mode), **options)
    decoded = decode_jpeg(data)
    assert decoded is not None and decoded.size == (61, 83)
    expected = np.asarray(decode_image(data)).astype(int)
    assert np.abs(decoded.pixels - expected).max() <= 1


@pytest.mark.parametrize("orientation", range(1, 9))
def test_turned_pictures_are_upright(orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encoded(photograph(640, 400), exif=exif, quality=95)
    upright = decode_image(data)
    decoded = decode_pixels(data)
    assert decoded.size == (upright.height, upright.width) == decoded.pixels.shape[:2]
    assert np.abs(decoded.pixels.astype(int) - np.asarray(upright)).max() <= 1
    smaller = decode_pixels(data, side=150)
    assert smaller.size == decoded.size and min(smaller.pixels.shape[:2]) == 150
    shrunk = upright.resize(smaller.pixels.shape[1::-1], Image.Resampling.BOX)
    assert np.abs(smaller.pixels.astype(int) - np.asarray(shrunk)).mean() < 3


def test_no_side_falls_below_what_is_asked_for() -> None:
    data = encoded(photograph(900, 500))
    for side in (0, 63, 64, 250, 251, 499, 500, 501, 10_000):
        height, width = decode_pixels(data, side).pixels.shape[:2]
        assert min(height, width) >= min(side, 500) and abs(width / height - 1.8) < 0.03
        assert side == 0 or height <= max(side + 63, 500)
    assert decode_pixels(data, 64).pixels.shape[0] < 130


def test_four_inks_damage_and_bombs_are_left_to_pillow(monkeypatch: pytest.MonkeyPatch) -> None:
    inks = encoded(photograph(40, 30, "CMYK"), quality=95)
    assert decode_jpeg(inks) is None
    assert np.array_equal(decode_pixels(inks).pixels, np.asarray(decode_image(inks)))
    whole = encoded(photograph(300, 200))
    for damaged in (whole[: len(whole) // 2], whole[:30], b"\xff\xd8\xff"):
        assert decode_jpeg(damaged) is None
        with pytest.raises(UnreadableImage):
            decode_pixels(damaged, side=50)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 20_000)
    assert decode_jpeg(whole) is None
    with pytest.raises(UnreadableImage, match="decompression bomb"):
        decode_pixels(whole, side=50)


def test_other_formats_and_missing_files_are_as_before(tmp_path: Path) -> None:
    stream = io.BytesIO()
    photograph(20, 10).save(stream, "PNG")
    assert decode_pixels(stream.getvalue(), side=5).pixels.shape == (10, 20, 3)
    with pytest.raises(UnreadableImage, match="no such file"):
        decode_pixels(tmp_path / "none.jpg")
    (tmp_path / "empty.jpg").write_bytes(b"")
    with pytest.raises(UnreadableImage, match="the file is empty"):
        decode_pixels(tmp_path / "empty.jpg")
