"""HEIC and AVIF files are decoded like any other, or say what they need."""

from __future__ import annotations

import io
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pillow_heif
import pytest
from PIL import AvifImagePlugin, Image, features

from tests.data.test_images import BLUE, ORIENTATION, RED, encoded, reason, two_halves
from twotower.data import heif
from twotower.data.folder import list_pictures
from twotower.data.images import decode_image, decode_pixels
from twotower.quality.picture import Limits, inspect

SIZE = (64, 32)
LIMITS = Limits(max_pixels=10**6, min_side=8)


def heic(image: Image.Image, **options: object) -> bytes:
    pillow_heif.register_heif_opener()
    return encoded(image, "HEIF", quality=95, **options)


def written(image: Image.Image, kind: str, **options: object) -> bytes:
    return heic(image, **options) if kind == "HEIF" else encoded(image, kind, quality=95, **options)


def corners(image: Image.Image) -> list[tuple[int, int, int]]:
    """Red or blue, whichever each corner is nearer to."""
    assert image.mode == "RGB"
    pixels = np.asarray(image, int)
    found = [pixels[y, x] for y in (1, -2) for x in (1, -2)]
    near = [min((RED, BLUE), key=lambda c, p=pixel: abs(p - c).max()) for pixel in found]
    assert all(abs(p - c).max() < 30 for p, c in zip(found, near, strict=True))
    return near


UPRIGHT = {
    1: [RED, BLUE, RED, BLUE],
    2: [BLUE, RED, BLUE, RED],
    3: [BLUE, RED, BLUE, RED],
    6: [RED, RED, BLUE, BLUE],
    7: [BLUE, BLUE, RED, RED],
    8: [BLUE, BLUE, RED, RED],
}


@pytest.mark.parametrize("kind", ["HEIF", "AVIF"])
@pytest.mark.parametrize("orientation", UPRIGHT)
def test_the_orientation_is_applied_once(kind: str, orientation: int) -> None:
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    data = written(two_halves(size=SIZE), kind, exif=exif.tobytes())
    made = decode_image(data)
    assert corners(made) == UPRIGHT[orientation]
    assert made.size == (SIZE if orientation < 5 else SIZE[::-1])
    decoded = decode_pixels(data, side=8)
    assert np.array_equal(decoded.pixels, np.asarray(made)) and decoded.size == made.size[::-1]


def test_exif_alone_turns_no_heic() -> None:
    exif = Image.Exif()
    exif[ORIENTATION] = 6
    data = heic(two_halves(size=SIZE), exif=exif)  # an object: EXIF is written, and no rotation
    assert b"Exif" in data and b"irot" not in data
    assert corners(decode_image(data)) == UPRIGHT[1]


@pytest.mark.parametrize("kind", ["HEIF", "AVIF"])
def test_alpha_is_laid_on_white(kind: str) -> None:
    image = Image.new("RGBA", SIZE, (*BLUE, 0))
    image.paste((*RED, 255), (0, 0, 32, 32))
    made = np.asarray(decode_image(written(image, kind)), int)
    assert abs(made[16, 4] - RED).max() < 30 and made[16, -4].min() > 250


def test_of_several_pictures_and_of_an_animation_the_first() -> None:
    frames = [Image.new("RGB", SIZE, colour) for colour in (RED, BLUE)]
    for kind in ("HEIF", "AVIF"):
        data = written(frames[0], kind, save_all=True, append_images=frames[1:])
        assert corners(decode_image(data)) == [RED] * 4


def test_ten_bits_become_eight() -> None:
    wide = np.zeros((32, 64, 3), np.uint16)
    wide[:, :32, 0], wide[:, 32:, 2] = 65535, 65535
    buffer = io.BytesIO()
    pillow_heif.from_bytes("RGB;16", SIZE, wide.tobytes()).save(buffer, quality=95)
    assert corners(decode_image(buffer.getvalue())) == UPRIGHT[1]


@pytest.mark.parametrize("kind", ["HEIF", "AVIF"])
def test_a_bomb_is_refused_and_damage_has_a_reason(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (32, 64, 3), dtype=np.uint8)
    data = written(Image.fromarray(noise), kind)
    for share in (0.03, 0.3, 0.9):
        assert 0 < len(reason(data[: int(len(data) * share)])) < 200
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    assert reason(data) == "too many pixels: it could be a decompression bomb"


@pytest.fixture
def no_decoders(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """As where pillow-heif is not installed, and where Pillow was built without AVIF."""
    Image.init()
    kinds = [kind for kind in Image.ID if kind not in ("HEIF", "AVIF")]
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "pillow_heif", None)
        patch.setattr(Image, "ID", kinds)
        patch.setattr(features, "check", lambda feature: False)
        heif._register_heic.cache_clear()
        yield
    heif._register_heic.cache_clear()


def test_what_cannot_be_decoded_here_says_what_it_needs(no_decoders: None, tmp_path: Path) -> None:
    buffer = io.BytesIO()
    pillow_heif.from_pillow(two_halves(size=SIZE)).save(buffer)
    path = tmp_path / "IMG_0001.HEIC"
    path.write_bytes(buffer.getvalue())
    assert [str(found) for found in list_pictures(tmp_path)] == [path.name]
    needs = "a HEIC picture, which needs a decoder: pip install 'twotower[heif]'"
    assert reason(path) == needs
    assert inspect(path, LIMITS).reason == needs
    avif = encoded(two_halves(size=SIZE), "AVIF")
    assert reason(avif) == "an AVIF picture, which this build of Pillow cannot decode"


def test_doctor_knows_both(tmp_path: Path) -> None:
    for kind in ("HEIF", "AVIF"):
        path = tmp_path / f"a.{kind}"
        path.write_bytes(written(two_halves(size=SIZE), kind))
        found = inspect(path, LIMITS)
        assert (found.fault, found.format, found.width, found.height) == ("", kind, *SIZE)


@pytest.mark.parametrize("kind", ["HEIF", "AVIF"])
def test_a_picture_is_decoded_by_one_thread(kind: str) -> None:
    """Others are decoded beside it."""
    data = written(two_halves(size=SIZE), kind)
    decode_image(data)
    assert AvifImagePlugin.DEFAULT_MAX_THREADS == 1
    assert kind == "AVIF" or pillow_heif.options.DECODE_THREADS == 1
