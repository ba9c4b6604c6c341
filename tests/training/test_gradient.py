"""Ranks, micro-batches and precision give the gradient of the one-process full batch."""

import functools

import pytest
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from tests.helpers import HashTokenizer, run_ranks
from twotower import distributed
from twotower.model_config import BatchNorm
from twotower.models.dual_encoder import DualEncoder, Tower
from twotower.models.locking import apply_batch_norm_policy
from twotower.train_config import Precision, TrainConfig
from twotower.training import gradient
from twotower.training.gradient import Gradient, Inputs
from twotower.training.loss import (
    LOSSES,
    ClipLossConfig,
    Pairs,
    SiglipLossConfig,
    Temperature,
    contrastive_loss,
)
from twotower.training.stepper import Stepper

BATCH = 24
CPU = torch.device("cpu")
LIMITS = {"fp64": 1e-9, "fp32": 1e-5, "bf16": 3e-2}
LOSS_CONFIGS = {"clip": ClipLossConfig(), "siglip": SiglipLossConfig()}


class TinyText(nn.Module):
    """Embeddings, one transformer layer, a mean over the tokens."""

    def __init__(self, dropout):
        super().__init__()
        self.embedding = nn.Embedding(97, 16)
        self.layer = nn.TransformerEncoderLayer(
            16, 2, 32, dropout, activation="gelu", batch_first=True, bias=False
        )

    def forward(self, tokens):
        return self.layer(self.embedding(tokens)).mean(1)


def make_model(loss, dropout=0.0, batch_norm=BatchNorm.frozen):
    """A convolution with batch norm and a transformer: what the towers are made of, in small."""
    torch.manual_seed(0)
    image = nn.Sequential(
        nn.Conv2d(3, 6, 3, 2), nn.BatchNorm2d(6), nn.GELU(), nn.Flatten(), nn.Dropout(dropout)
    )
    model = DualEncoder(
        Tower(image, nn.Linear(6 * 49, 8)), Tower(TinyText(dropout), nn.Linear(16, 8))
    )
    if loss == "siglip":
        # Not SigLIP's own start, at which nearly all of the gradient is that of the bias.
        model.start_temperature(1.0, -1.0)
    apply_batch_norm_policy(model, batch_norm, distributed.world_size())
    return model.train()


def make_inputs(dtype):
    generator = torch.Generator().manual_seed(3)
    return Inputs(
        images=torch.randn(BATCH, 3, 16, 16, generator=generator, dtype=dtype),
        tokens=torch.randint(1, 97, (BATCH, HashTokenizer.context_length), generator=generator),
        keys=torch.arange(BATCH)[:, None].repeat(1, 2),
    )


def mine(inputs):
    rows = distributed.shard_range(BATCH, distributed.rank(), distributed.world_size())
    part = slice(rows.start, rows.stop)
    return Inputs(images=inputs.images[part], tokens=inputs.tokens[part], keys=inputs.keys[part])


def gradients(loss, precision, micro_batches, dropout=0.0, batch_norm=BatchNorm.frozen):
    """This rank's gradients after one backward pass over its part of the same global batch."""
    dtype = torch.float64 if precision == "fp64" else torch.float32
    model = make_model(loss, dropout, batch_norm).to(dtype)
    inputs = mine(make_inputs(dtype))
    world = distributed.world_size()
    step = Gradient(
        model=model,
        parallel=DistributedDataParallel(model) if world > 1 else model,
        loss=LOSSES.build(LOSS_CONFIGS[loss]),
        device=CPU,
        precision=Precision.bf16 if precision == "bf16" else Precision.fp32,
        micro_batch_size=len(inputs) // micro_batches if micro_batches > 1 else 0,
    )
    torch.manual_seed(100 + distributed.rank())
    step.backward(inputs)
    state = {f"buffer.{name}": buffer for name, buffer in model.named_buffers()}
    return {name: p.grad for name, p in model.named_parameters()} | state


CASES = [
    (loss, precision, micro_batches)
    for loss in LOSS_CONFIGS
    for precision in LIMITS
    for micro_batches in (1, 2, 4)
]


def all_gradients():
    return {case: gradients(*case) for case in CASES}


@functools.cache
def found_on(world):
    return [all_gradients()] if world == 1 else run_ranks(all_gradients, world)


def worst_difference(found, expected):
    """The largest |g - g0| / |g0| over the parameters."""
    names = [name for name in expected if not name.startswith("buffer.")]
    assert set(found) == set(expected)
    norms = {name: float(expected[name].norm()) for name in names}
    assert all(norm > 0 for norm in norms.values()), norms
    return max(float((found[n] - expected[n]).norm()) / norms[n] for n in names)


@pytest.mark.parametrize("world", [1, 2, 3])
@pytest.mark.parametrize(("loss", "precision", "micro_batches"), CASES)
def test_the_gradient_is_that_of_the_full_batch(world, loss, precision, micro_batches):
    # Halves are held against the same batch in fp32.
    full = gradients(loss, "fp32" if precision == "bf16" else precision, 1)
    assert {"logit_scale", "logit_bias"} & set(full) == (
        {"logit_scale", "logit_bias"} if loss == "siglip" else {"logit_scale"}
    )
    for found in found_on(world):
        case = found[loss, precision, micro_batches]
        assert worst_difference(case, full) <= LIMITS[precision]


def with_dropout(world, micro_batches):
    return gradients("clip", "fp64", micro_batches, dropout=0.3)


def one_graph(world, micro_batches):
    """The same micro-batches of the same ranks under the same random states, in one graph."""
    model, inputs = make_model("clip", 0.3).double(), make_inputs(torch.float64)
    size = BATCH // world // micro_batches
    outputs = []
    for start in range(0, BATCH, size):
        if start % (BATCH // world) == 0:
            torch.manual_seed(100 + start // (BATCH // world))
        rows = slice(start, start + size)
        outputs.append(model(inputs.images[rows], inputs.tokens[rows]))
    image, text = (torch.cat([output[i] for output in outputs]) for i in (0, 1))
    pairs = Pairs(image, text, inputs.keys)
    temperature = Temperature(outputs[0].logit_scale, outputs[0].logit_bias)
    contrastive_loss(LOSSES.build(ClipLossConfig()), pairs, pairs, temperature).backward()
    return {name: p.grad for name, p in model.named_parameters()}


@pytest.mark.parametrize(("world", "micro_batches"), [(1, 2), (1, 4), (2, 1), (2, 3), (3, 4)])
def test_with_dropout_the_gradient_is_that_of_one_graph(world, micro_batches):
    expected = one_graph(world, micro_batches)
    results = (
        [with_dropout(1, micro_batches)]
        if world == 1
        else run_ranks(with_dropout, world, world, micro_batches)
    )
    for found in results:
        found = {name: grad for name, grad in found.items() if name in expected}
        assert worst_difference(found, expected) <= 1e-9
    # It is not the gradient without dropout, nor with other states.
    assert worst_difference(expected, gradients_of(one_graph(1, 6))) > 1e-3


def gradients_of(found):
    return {name: grad for name, grad in found.items() if not name.startswith("buffer.")}


def gather_without_gradient(*case):
    gather = gradient.all_gather_with_grad
    gradient.all_gather_with_grad = lambda tensor: gather(tensor).detach()
    try:
        return gradients(*case)
    finally:
        gradient.all_gather_with_grad = gather


@pytest.mark.parametrize("micro_batches", [1, 2])
def test_the_comparison_sees_a_gather_that_loses_its_gradient(micro_batches):
    expected = gradients("clip", "fp64", 1)
    found = run_ranks(gather_without_gradient, 2, "clip", "fp64", micro_batches)[0]
    assert worst_difference(found, expected) > 0.1


@pytest.mark.parametrize(("loss", "name"), [("clip", "logit_scale"), ("siglip", "logit_bias")])
def test_the_comparison_sees_a_scalar_counted_once_a_micro_batch(loss, name, monkeypatch):
    expected = gradients(loss, "fp64", 1)
    # Scalars cached as often as there are micro-batches: what peers do.
    monkeypatch.setattr(gradient, "_is_last", lambda number, parts: True)
    found = gradients(loss, "fp64", 4)
    assert float((found[name] / expected[name] - 4).abs()) < 1e-9
    assert worst_difference(found, expected) > 1


def test_running_statistics_change_once_a_step():
    before = make_model("clip", batch_norm=BatchNorm.local).state_dict()
    names = [f"buffer.image_tower.trunk.1.{n}" for n in ("running_mean", "running_var")]
    whole = gradients("clip", "fp64", 1, 0.0, BatchNorm.local)
    parts = gradients("clip", "fp64", 4, 0.0, BatchNorm.local)
    # The mean over equal micro-batches of the means is the mean over the batch.
    torch.testing.assert_close(parts[names[0]], whole[names[0]], rtol=1e-12, atol=1e-12)
    assert not torch.allclose(parts[names[1]], before[names[1].removeprefix("buffer.")].double())
    assert int(parts["buffer.image_tower.trunk.1.num_batches_tracked"]) == 1


def test_gather_with_grad_is_the_identity_on_one_rank():
    features = nn.Parameter(torch.randn(3, 2))
    assert distributed.all_gather_with_grad(features) is features


def statistics_after_a_step(micro_batch_size):
    model = make_model("clip", batch_norm=BatchNorm.local)
    loss = LOSSES.build(ClipLossConfig())
    config = TrainConfig(batch_size=BATCH, micro_batch_size=micro_batch_size)
    stepper = Stepper(model, BatchNorm.local, loss, config, CPU)
    stepper.train()
    done = stepper.step(mine(make_inputs(torch.float32)), 1e-3)
    return done.loss, [buffer.clone() for buffer in stepper.statistics]


@pytest.mark.parametrize("micro_batch_size", [0, 4])
def test_ranks_have_the_same_statistics_and_the_same_loss_after_a_step(micro_batch_size):
    (loss, one), (other_loss, other) = run_ranks(statistics_after_a_step, 2, micro_batch_size)
    assert loss == other_loss and len(one) == 2
    assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))
