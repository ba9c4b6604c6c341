from __future__ import annotations

import pickle

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import CenterCrop, Compose, InterpolationMode, Resize

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
    assert ours.shape == (3, 64, 64) and ours.dtype == torch.uint8 and ours.is_contiguous()
    difference = (ours.int() - reference.int()).abs()
    assert difference.float().mean() < 0.1
    assert difference.max() <= 2


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
    made = image_input.train_transform(ModelConfig(crop_min_scale=0.7, flip=True))
    assert made == TrainTransform(48, Interpolation.bilinear, min_scale=0.7, flip=True)
    assert pickle.loads(pickle.dumps(made)) == made
    assert image_input.eval_transform() == EvalTransform(48, Interpolation.bilinear)
