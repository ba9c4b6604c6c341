from __future__ import annotations

import io
import pickle

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import (
    CenterCrop,
    Compose,
    InterpolationMode,
    RandomResizedCrop,
    Resize,
)

from twotower.data.images import decode_pixels
from twotower.model_config import ModelConfig
from twotower.models.preprocess import EvalTransform, ImageInput, Interpolation, TrainTransform


def photograph(width: int, height: int) -> Image.Image:
    """Smooth gradients with edges and some noise, as in photographs."""
    rng = np.random.default_rng(width * height)
    y, x = np.mgrid[0:height, 0:width]
    base = 128 + 90 * np.sin(x / 17)[..., None] * np.cos(y / 23)[..., None] * [1, 0.5, -1]
    base[(x // 40 + y // 30) % 2 == 0] += 25
    pixels = base + rng.normal(0, 6, base.shape)
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


SIZES = [(256, 256), (500, 375), (375, 500), (333, 251), (1024, 97), (40, 30), (64, 64), (65, 64)]


@pytest.mark.parametrize("way", list(Interpolation))
@pytest.mark.parametrize(("width", "height"), SIZES)
def test_eval_equals_torchvision_on_pil(width: int, height: int, way: Interpolation) -> None:
    image = photograph(width, height)
    pil = Compose([Resize(64, InterpolationMode(way.value)), CenterCrop(64)])(image)
    reference = torch.from_numpy(np.array(pil)).permute(2, 0, 1)
    ours = EvalTransform(64, way)(image)
    assert ours.shape == (3, 64, 64) and ours.dtype == torch.uint8
    assert ours.stride() == (1, 3 * 64, 3)  # channels last, and nothing of what was cut off
    difference = (ours.int() - reference.int()).abs()
    assert difference.float().mean() < 0.1
    assert difference.max() <= 2


@pytest.mark.parametrize("eighths", [4, 5, 7])
@pytest.mark.parametrize(("width", "height"), [(1001, 667), (640, 480), (333, 1201)])
def test_a_picture_that_was_decoded_smaller_is_cropped_as_the_whole(
    width: int, height: int, eighths: int
) -> None:
    """Its last row and column may stand for a part of one: a shift by it would be seen."""
    image = photograph(width, height)
    stream = io.BytesIO()
    image.save(stream, "JPEG", quality=95)
    small = decode_pixels(stream.getvalue(), side=min(width, height) * eighths // 8)
    assert small.pixels.shape[:2] == (-(-height * eighths // 8), -(-width * eighths // 8))
    whole = decode_pixels(stream.getvalue())
    difference = (EvalTransform(64)(small).int() - EvalTransform(64)(whole).int()).abs()
    assert difference.float().mean() < 0.6
    assert (difference > 4).float().mean() < 0.01
    for seed in range(5):
        made = []
        for picture in (whole, small):
            torch.manual_seed(seed)
            made.append(TrainTransform(48, min_scale=0.3, flip=True)(picture).int())
        # Half a pixel of rounding at the edges of the crop; other crops differ by more than 20.
        assert (made[0] - made[1]).abs().float().mean() < 4


def test_the_smallest_crop_of_what_decoding_leaves_has_twice_the_pixels() -> None:
    transform = TrainTransform(48, min_scale=0.3, exact=False)
    side = transform.side
    smallest = [side] * 2
    for seed in range(200):
        torch.manual_seed(seed)
        whole = torch.empty(3, side, side, device="meta")
        box = RandomResizedCrop.get_params(whole, [0.3, 1.0], [3 / 4, 4 / 3])
        smallest = [min(pair) for pair in zip(smallest, box[2:], strict=True)]
    assert min(smallest) >= 2 * 48 and min(smallest) < 3 * 48
    assert TrainTransform(48).side == EvalTransform(48).side == 0


def test_a_strip_is_cut_before_it_is_resized() -> None:
    assert EvalTransform(224)(Image.new("RGB", (60_000, 2))).shape == (3, 224, 224)
    strip = photograph(20, 3_000)
    middle = strip.crop((0, 500, 20, 2_500))
    assert torch.equal(EvalTransform(64)(strip), EvalTransform(64)(middle))


def test_train_crops_by_the_seed_and_whole_pictures_are_the_eval_ones() -> None:
    image = photograph(96, 96)
    transform = TrainTransform(32, min_scale=0.5)
    torch.manual_seed(3)
    first = transform(image)
    torch.manual_seed(3)
    assert torch.equal(transform(image), first)
    assert not torch.equal(transform(image), first)
    whole = TrainTransform(32, min_scale=1.0)(image)
    assert torch.equal(whole, EvalTransform(32)(image))


def test_flip_mirrors_about_half_of_the_pictures() -> None:
    image = photograph(48, 48)
    plain, mirrored = EvalTransform(32)(image), EvalTransform(32)(image).flip(-1)
    torch.manual_seed(0)
    made = [TrainTransform(32, min_scale=1.0, flip=True)(image) for _ in range(40)]
    flips = [torch.equal(picture, mirrored) for picture in made]
    assert all(torch.equal(p, mirrored if f else plain) for p, f in zip(made, flips, strict=True))
    assert 10 <= sum(flips) <= 30


def test_image_input_survives_json_and_transforms_survive_pickle() -> None:
    image_input = ImageInput(
        size=48, mean=(0.1, 0.2, 0.3), std=(1, 2, 3), interpolation=Interpolation.bilinear
    )
    assert ImageInput.from_json(image_input.to_json()) == image_input
    made = image_input.train_transform(ModelConfig(crop_min_scale=0.7, flip=True, exact=True))
    assert made == TrainTransform(48, Interpolation.bilinear, min_scale=0.7, flip=True)
    assert pickle.loads(pickle.dumps(made)) == made
    made_exact = image_input.eval_transform(ModelConfig(exact=True))
    assert made_exact == EvalTransform(48, Interpolation.bilinear, exact=True)
    assert image_input.eval_transform(ModelConfig()).side == 96
    assert image_input.eval_transform(ModelConfig(exact=True)).side == 0
