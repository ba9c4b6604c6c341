"""Re-encoded, resized and cropped pictures are near duplicates; other pictures are not."""

from __future__ import annotations

import io
from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import pytest
import torch
from PIL import Image, ImageOps

from tests.quality.pictures import cropped, encoded, photograph, resized
from twotower.quality.near import describe, find_near
from twotower.quality.picture import make_thumb

COUNT = 60


def thumbs(images: list[Image.Image]) -> npt.NDArray[np.uint8]:
    made = [make_thumb(np.asarray(image.convert("RGB"))) for image in images]
    return np.stack([np.frombuffer(thumb, np.uint8) for thumb in made])


def quality_70(image: Image.Image) -> Image.Image:
    return Image.open(io.BytesIO(encoded(image, quality=70)))


def off_a_corner(image: Image.Image) -> Image.Image:
    return image.crop((0, image.height // 10, image.width * 9 // 10, image.height))


def everything(image: Image.Image) -> Image.Image:
    return quality_70(resized(cropped(image)))


@pytest.mark.parametrize(
    "change", [quality_70, resized, cropped, off_a_corner, everything, ImageOps.grayscale]
)
def test_changed_pictures_are_found_and_no_others(
    change: Callable[[Image.Image], Image.Image],
) -> None:
    images = [photograph(seed) for seed in range(COUNT)]
    changed = [change(image) for image in images[:20]]
    found = find_near(thumbs([*images, *changed]), 0.9)
    expected = [[i, COUNT + i] for i in range(20)]
    assert [pair for pair in expected if pair not in found.rows.tolist()] == []
    assert [pair for pair in found.rows.tolist() if pair not in expected] == []
    assert found.similarity.min() >= 0.9


def test_another_colour_or_brightness_is_another_picture() -> None:
    """Correlation alone would take a red heart for a blue one, or for a black one."""
    image = photograph(1)
    red, green, blue = image.split()
    swapped = Image.merge("RGB", (blue, green, red)).point(lambda value: value)
    vivid = [Image.blend(Image.new("RGB", image.size, c), image, 0.5) for c in ("red", "blue")]
    dark = image.point(lambda value: value // 2)
    assert len(find_near(thumbs([*vivid]), 0.9).rows) == 0
    assert len(find_near(thumbs([image, dark]), 0.9).rows) == 0
    assert len(find_near(thumbs([image, image]), 0.9).rows) == 1
    assert swapped.size == image.size


def test_lists_change_nothing() -> None:
    images = [photograph(seed) for seed in range(40)]
    all_thumbs = thumbs([*images, *map(everything, images[:15])])
    exact, listed = find_near(all_thumbs, 0.9), find_near(all_thumbs, 0.9, exact=10)
    np.testing.assert_array_equal(exact.rows, listed.rows)


def test_descriptor_is_the_weighted_cosine_transform() -> None:
    pictures = np.random.default_rng(0).uniform(0, 255, (3, 32, 32)).astype(np.float32)
    angle = np.pi * np.outer(np.arange(8), np.arange(32) + 0.5) / 32
    basis = np.cos(angle) * np.sqrt(np.where(np.arange(8) == 0, 1, 2) / 32)[:, None]
    spectrum = basis @ pictures @ basis.T
    weighted = spectrum * np.hypot(*np.mgrid[:8, :8])
    expected = weighted.reshape(3, -1)
    expected /= np.linalg.norm(expected, axis=1, keepdims=True)
    np.testing.assert_allclose(describe(torch.from_numpy(pictures), 8), expected, atol=1e-5)


def test_none() -> None:
    assert find_near(thumbs([photograph(1)])[:0], 0.9).rows.shape == (0, 2)
