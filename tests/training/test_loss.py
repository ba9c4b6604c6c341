"""The loss against a double loop, and the gradients of several ranks against one process."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from tests.helpers import run_ranks, tiny_bundle
from twotower import distributed
from twotower.training.loss import clip_loss

BATCH = 12


def looped_loss(images, texts, scale):
    """The definition of figure 3 of Radford et al., one pair at a time."""
    total = 0.0
    for i in range(len(images)):
        row = [math.exp(scale * float(images[i] @ texts[j])) for j in range(len(texts))]
        column = [math.exp(scale * float(images[j] @ texts[i])) for j in range(len(texts))]
        total -= (math.log(row[i] / sum(row)) + math.log(column[i] / sum(column))) / 2
    return total / len(images)


def test_clip_loss_equals_a_double_loop():
    generator = torch.Generator().manual_seed(0)
    images, texts = (
        F.normalize(torch.randn(7, 5, generator=generator, dtype=torch.float64), dim=1)
        for _ in range(2)
    )
    scale = torch.tensor(4.0, dtype=torch.float64)
    loss = clip_loss(images, texts, images, texts, scale)
    assert float(loss) == pytest.approx(looped_loss(images, texts, 4.0), abs=1e-12)
    parts = [
        clip_loss(images[s], texts[s], images, texts, scale, first_row=s.start)
        for s in (slice(0, 2), slice(2, 7))
    ]
    assert float(2 / 7 * parts[0] + 5 / 7 * parts[1]) == pytest.approx(float(loss), abs=1e-12)


def test_features_that_tell_nothing_cost_log_n():
    same = F.normalize(torch.ones(16, 4), dim=1)
    assert float(clip_loss(same, same, same, same, torch.tensor(10.0))) == pytest.approx(
        math.log(16)
    )


def _batch(dtype):
    generator = torch.Generator().manual_seed(3)
    images = torch.randn(BATCH, 3, 16, 16, generator=generator, dtype=dtype)
    tokens = torch.randint(1, 97, (BATCH, 8), generator=generator)
    return images, tokens


def gradients(dtype, gather_has_gradient=True):
    """This rank's gradients after one backward pass on its part of the same global batch."""
    bundle = tiny_bundle()
    model = bundle.model.to(dtype)
    parallel = DistributedDataParallel(model) if distributed.world_size() > 1 else model
    rows = distributed.shard_range(BATCH, distributed.rank(), distributed.world_size())
    images, tokens = _batch(dtype)
    output = parallel(images[rows.start : rows.stop], tokens[rows.start : rows.stop])
    everyone = []
    for features in (output.image_features, output.text_features):
        gathered = distributed.all_gather_with_grad(features)
        if not gather_has_gradient:
            gathered = gathered.detach()
        everyone.append(gathered)
    clip_loss(
        output.image_features,
        output.text_features,
        *everyone,
        output.logit_scale,
        first_row=rows.start,
    ).backward()
    return {name: p.grad for name, p in model.named_parameters()}


def worst_difference(found, expected):
    assert set(found) == set(expected)
    norms = {name: float(grad.norm()) for name, grad in expected.items()}
    assert all(norm > 0 for norm in norms.values()), norms
    return max(float((found[n] - expected[n]).norm()) / norms[n] for n in norms)


@pytest.mark.parametrize("world", [2, 3])
@pytest.mark.parametrize(("dtype", "limit"), [(torch.float32, 1e-5), (torch.float64, 1e-9)])
def test_gradients_of_ranks_equal_the_full_batch(world, dtype, limit):
    expected = gradients(dtype)
    for found in run_ranks(gradients, world, dtype):
        assert worst_difference(found, expected) <= limit


def test_the_comparison_sees_a_gather_that_loses_its_gradient():
    expected = gradients(torch.float64)
    found = run_ranks(gradients, 2, torch.float64, False)[0]
    assert worst_difference(found, expected) > 0.1


def test_gather_with_grad_is_the_identity_on_one_rank():
    features = nn.Parameter(torch.randn(3, 2))
    assert distributed.all_gather_with_grad(features) is features
