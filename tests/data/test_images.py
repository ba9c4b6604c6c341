import io
import warnings
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from twotower.data.images import UnreadableImage, decode_image

RED, BLUE, WHITE = (255, 0, 0), (0, 0, 255), (255, 255, 255)
ORIENTATION = 0x0112


def two_halves(mode: str = "RGB", size: tuple[int, int] = (16, 8)) -> Image.Image:
    """Red on the left, blue on the right."""
    image = Image.new("RGB", size, RED)
    image.paste(BLUE, (size[0] // 2, 0, *size))
    return image.convert(mode)


def encoded(image: Image.Image, kind: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def corners(image: Image.Image) -> list[tuple[int, ...]]:
    assert image.mode == "RGB"
    right, bottom = image.width - 1, image.height - 1
    return [image.getpixel(xy) for xy in ((0, 0), (right, 0), (0, bottom), (right, bottom))]


@pytest.mark.parametrize(
    ("orientation", "expected"),
    [
        (1, [RED, BLUE, RED, BLUE]),
        (2, [BLUE, RED, BLUE, RED]),
        (3, [BLUE, RED, BLUE, RED]),
        (4, [RED, BLUE, RED, BLUE]),
        (5, [RED, RED, BLUE, BLUE]),
        (6, [RED, RED, BLUE, BLUE]),
        (7, [BLUE, BLUE, RED, RED]),
        (8, [BLUE, BLUE, RED, RED]),
    ],
)
def test_exif_orientation_is_applied(orientation: int, expected: list[tuple[int, ...]]) -> None:
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    made = decode_image(encoded(two_halves(), "PNG", exif=exif))
    assert corners(made) == expected
    assert made.size == ((16, 8) if orientation < 5 else (8, 16))


def test_damaged_exif_does_not_lose_the_picture() -> None:
    data = encoded(two_halves(), "JPEG", exif=b"Exif\0\0" + bytes(range(200, 240)))
    assert decode_image(data).size == (16, 8)


def test_cmyk() -> None:
    made = np.asarray(decode_image(encoded(two_halves("CMYK"), "JPEG", quality=100)), dtype=int)
    assert np.abs(made - np.asarray(two_halves(), dtype=int)).max() < 30


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_16_bits_keep_the_brightness_of_8(kind: str) -> None:
    wide = np.linspace(0, 65535, 256, dtype=np.uint16).reshape(16, 16)
    made = np.asarray(decode_image(encoded(Image.fromarray(wide), kind)), dtype=int)
    assert np.abs(made - (wide.astype(float) / 257)[..., None]).max() <= 1


@pytest.mark.parametrize("value", [0, 40, 0x4000, 65535])
def test_a_transparent_value_of_16_bits_is_white(value: int) -> None:
    levels = [0, 40, 40 * 257, 0x4000, 65535]
    image = Image.fromarray(np.array([levels], np.uint16))
    made = np.asarray(decode_image(encoded(image, "PNG", transparency=value)))[0, :, 0]
    expected = [255 if level == value else level / 257 for level in levels]
    assert np.abs(made - np.array(expected)).max() <= 1


@pytest.mark.parametrize(("brightest", "scale"), [(1.0, 255.0), (255.0, 1.0)])
def test_floats_are_of_unit_range_or_of_bytes(brightest: float, scale: float) -> None:
    values = np.linspace(0, brightest, 64, dtype=np.float32).reshape(8, 8)
    made = np.asarray(decode_image(encoded(Image.fromarray(values), "TIFF")), dtype=float)
    assert np.abs(made - (values * scale)[..., None]).max() <= 1


def test_a_transparent_entry_of_a_palette_is_white() -> None:
    image = Image.new("P", (2, 1))
    image.putpalette([*RED, *BLUE])
    image.putpixel((1, 0), 1)
    made = decode_image(encoded(image, "PNG", transparency=1))
    assert [made.getpixel((x, 0)) for x in range(2)] == [RED, WHITE]


@pytest.mark.parametrize(
    ("mode", "colour", "expected"),
    [
        ("RGBA", (255, 0, 0, 0), WHITE),
        ("RGBA", (255, 0, 0, 255), RED),
        ("RGBA", (0, 0, 255, 51), (204, 204, 255)),
        ("LA", (0, 0), WHITE),
        ("L", 7, (7, 7, 7)),
        ("1", 1, WHITE),
    ],
)
def test_alpha_is_laid_on_white(mode: str, colour: object, expected: tuple[int, ...]) -> None:
    made = decode_image(encoded(Image.new(mode, (3, 3), colour), "PNG"))
    assert made.getpixel((1, 1)) == expected


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG", "TIFF"])
def test_of_an_animation_the_first_frame(kind: str) -> None:
    frames = [Image.new("RGB", (8, 8), colour) for colour in (RED, BLUE)]
    options = {"lossless": True} if kind == "WEBP" else {}
    data = encoded(frames[0], kind, save_all=True, append_images=frames[1:], **options)
    assert corners(decode_image(data)) == [RED] * 4


def test_a_path_bytes_and_an_open_picture_give_the_same(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    path.write_bytes(encoded(two_halves(), "PNG"))
    expected = np.asarray(two_halves())
    for source in (path, str(path), path.read_bytes(), two_halves()):
        assert np.array_equal(np.asarray(decode_image(source)), expected)


def reason(source: object) -> str:
    with pytest.raises(UnreadableImage) as caught:
        decode_image(source)  # type: ignore[arg-type]
    return str(caught.value)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF"])
@pytest.mark.parametrize("share", [0.3, 0.6, 0.9])
def test_a_truncated_picture_has_a_short_reason_without_the_path(
    kind: str, share: float, tmp_path: Path
) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (40, 40, 3), dtype=np.uint8)
    data = encoded(Image.fromarray(noise), kind)
    path = tmp_path / "cut"
    path.write_bytes(data[: int(len(data) * share)])
    text = reason(path)
    assert 0 < len(text) < 120 and "cut" not in text.split() and str(tmp_path) not in text


def test_what_is_no_picture_says_so(tmp_path: Path) -> None:
    assert reason(b"") == "the file is empty"
    assert reason(b"just text\n") == "not a picture"
    assert reason(tmp_path / "none.jpg") == "no such file or directory"
    assert reason(tmp_path) == "is a directory"


def test_a_decompression_bomb_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    data = encoded(two_halves(size=(30, 30)), "PNG")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert reason(data) == "too many pixels: it could be a decompression bomb"
