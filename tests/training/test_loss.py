"""Each loss against its definition in plain loops; blocks of rows against the whole matrix."""

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from twotower.train_config import SameImage
from twotower.training.loss import (
    LOSSES,
    ClipLossConfig,
    Pairs,
    SiglipLossConfig,
    SoftTargetLossConfig,
    Temperature,
    contrastive_loss,
)

CONFIGS = {"clip": ClipLossConfig, "siglip": SiglipLossConfig, "soft_target": SoftTargetLossConfig}
# Pairs 0 and 3 are of one image, 1 and 4 have one caption, 3 and 5 are of one image.
KEYS = torch.tensor([[0, 0], [1, 1], [2, 2], [0, 3], [4, 1], [0, 5], [6, 6]])
SCALE, BIAS = 4.0, -1.5


def make_pairs(count=7, dim=5, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    image, text = (
        F.normalize(torch.randn(count, dim, generator=generator, dtype=dtype), dim=1)
        for _ in range(2)
    )
    return Pairs(image, text, KEYS if count == 7 else torch.arange(count)[:, None].repeat(1, 2))


def make_temperature(dtype=torch.float64):
    return Temperature(torch.tensor(SCALE, dtype=dtype), torch.tensor(BIAS, dtype=dtype))


def make_loss(name, same_image=SameImage.ignore, **settings):
    return LOSSES.build(CONFIGS[name](same_image=same_image, **settings))


def value(loss, pairs, **settings):
    return float(contrastive_loss(loss, pairs, pairs, make_temperature(), **settings))


def alike(keys, i, j):
    return bool((keys[i] == keys[j]).any())


def looped_softmax(pairs, same_image, targets):
    """Cross-entropy of both directions, one pair at a time; targets(i) is a weight a column."""
    total, count = 0.0, len(pairs.image)
    for queries, items in ((pairs.image, pairs.text), (pairs.text, pairs.image)):
        for i in range(count):
            kept = [
                j
                for j in range(count)
                if not (same_image is SameImage.mask and i != j and alike(pairs.keys, i, j))
            ]
            powers = {j: math.exp(SCALE * float(queries[i] @ items[j])) for j in kept}
            weights = targets(i, kept)
            total -= sum(weights[j] * math.log(powers[j] / sum(powers.values())) for j in kept)
    return total / 2 / count


def clip_targets(pairs, same_image):
    def targets(i, kept):
        positives = [
            j
            for j in kept
            if j == i or (same_image is SameImage.positive and alike(pairs.keys, i, j))
        ]
        return {j: (j in positives) / len(positives) for j in kept}

    return targets


def soft_targets(pairs, same_image, scale):
    def targets(i, kept):
        powers = {}
        for j in kept:
            mean = float(pairs.image[i] @ pairs.image[j] + pairs.text[i] @ pairs.text[j]) / 2
            if same_image is SameImage.positive and alike(pairs.keys, i, j):
                mean = 1.0
            powers[j] = math.exp(scale * mean)
        return {j: power / sum(powers.values()) for j, power in powers.items()}

    return targets


def looped_siglip(pairs, same_image):
    total, count = 0.0, len(pairs.image)
    for i, j in itertools.product(range(count), repeat=2):
        same = alike(pairs.keys, i, j)
        if same_image is SameImage.mask and i != j and same:
            continue
        sign = 1 if i == j or (same_image is SameImage.positive and same) else -1
        logit = SCALE * float(pairs.image[i] @ pairs.text[j]) + BIAS
        total += math.log1p(math.exp(-sign * logit))
    return total / count


@pytest.mark.parametrize("same_image", list(SameImage))
def test_losses_equal_their_definitions_in_loops(same_image):
    pairs = make_pairs()
    clip = looped_softmax(pairs, same_image, clip_targets(pairs, same_image))
    assert value(make_loss("clip", same_image), pairs) == pytest.approx(clip, abs=1e-12)
    sigmoid = looped_siglip(pairs, same_image)
    assert value(make_loss("siglip", same_image), pairs) == pytest.approx(sigmoid, abs=1e-12)
    for given, scale in ((0.0, SCALE), (2.5, 2.5)):
        soft = looped_softmax(pairs, same_image, soft_targets(pairs, same_image, scale))
        loss = make_loss("soft_target", same_image, target_scale=given)
        assert value(loss, pairs) == pytest.approx(soft, abs=1e-12)


def test_what_same_image_means_changes_each_loss():
    pairs = make_pairs()
    for name in CONFIGS:
        values = [value(make_loss(name, same_image), pairs) for same_image in SameImage]
        assert min(abs(a - b) for a, b in itertools.combinations(values, 2)) > 1e-3


def test_features_that_tell_nothing_cost_log_n():
    same = F.normalize(torch.ones(16, 4, dtype=torch.float64), dim=1)
    pairs = Pairs(same, same, torch.arange(16)[:, None].repeat(1, 2))
    assert value(make_loss("clip"), pairs) == pytest.approx(math.log(16))


def gradients(loss, pairs, parts, block_rows):
    """Gradients of the mean over parts (as ranks hold them) of the parts' losses."""
    image, text = pairs.image.clone().requires_grad_(), pairs.text.clone().requires_grad_()
    temperature = Temperature(*(scalar.requires_grad_() for scalar in make_temperature()))
    total = torch.zeros((), dtype=torch.float64)
    for part in parts:
        total = total + (part.stop - part.start) / len(image) * contrastive_loss(
            loss,
            Pairs(image[part], text[part], pairs.keys[part]),
            Pairs(image, text, pairs.keys),
            temperature,
            first_row=part.start,
            block_rows=block_rows,
        )
    total.backward()
    zero = torch.zeros(())
    return (
        total.detach(),
        image.grad,
        text.grad,
        *(zero if scalar.grad is None else scalar.grad for scalar in temperature),
    )


@pytest.mark.parametrize("same_image", list(SameImage))
@pytest.mark.parametrize("name", CONFIGS)
def test_blocks_and_ranks_of_rows_give_the_value_and_gradient_of_the_whole(name, same_image):
    pairs, loss = make_pairs(), make_loss(name, same_image)
    whole = gradients(loss, pairs, [slice(0, 7)], 7)
    for parts, block_rows in (([slice(0, 7)], 2), ([slice(0, 3), slice(3, 7)], 1)):
        for found, expected in zip(gradients(loss, pairs, parts, block_rows), whole, strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", ["clip", "siglip"])
def test_the_gradient_is_that_of_the_value(name):
    pairs, loss = make_pairs(), make_loss(name, SameImage.positive)

    def of(image, text, scale, bias):
        pairs_ = Pairs(image, text, pairs.keys)
        return contrastive_loss(loss, pairs_, pairs_, Temperature(scale, bias), block_rows=3)

    inputs = [tensor.clone().requires_grad_() for tensor in (*pairs[:2], *make_temperature())]
    assert torch.autograd.gradcheck(of, inputs)


class LargestTensor(TorchDispatchMode):
    """Remembers the most elements that any operation gave back."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else [out]:
            if isinstance(tensor, torch.Tensor):
                self.elements = max(self.elements, tensor.numel())
        return out


@pytest.mark.parametrize("name", CONFIGS)
def test_the_matrix_of_all_pairs_never_exists(name):
    count, block = 1024, 16
    pairs = make_pairs(count, 8, torch.float32)
    pairs = Pairs(pairs.image.requires_grad_(), pairs.text.requires_grad_(), pairs.keys)
    loss = make_loss(name, SameImage.mask)
    with LargestTensor() as largest:
        contrastive_loss(
            loss, pairs, pairs, make_temperature(torch.float32), block_rows=block
        ).backward()
    # The keys of images and of captions are compared side by side.
    assert count * block <= largest.elements <= 2 * count * block
