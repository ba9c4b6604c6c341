"""The module that went bad first is named: planted in a weight, an output, a loss, a gradient."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from tests.helpers import tiny_bundle
from twotower.training.bad_module import name_bad_module


class Planted(nn.Module):
    """Applies a function that goes bad."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


class Residual(nn.Module):
    """A block with arithmetic of its own between its children, and a ReLU in place."""

    def __init__(self, inner: nn.Module, after: Callable[[Tensor], Tensor] | None = None) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(6)
        self.inner = inner
        self.relu = nn.ReLU(inplace=True)
        self.out = nn.Linear(6, 6)
        self.after = after or (lambda x: x)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.out(self.after(self.relu(self.inner(self.norm(x)) + 1.0)))


def layers(planted: nn.Module | None = None, after: Callable[[Tensor], Tensor] | None = None):
    """Four blocks; what goes bad is in the third."""
    torch.manual_seed(0)
    blocks = [Residual(nn.Linear(6, 6)) for _ in range(4)]
    blocks[2] = Residual(planted or nn.Linear(6, 6), after)
    return nn.Sequential(nn.Linear(6, 6), nn.Dropout(0.5), *blocks)


def step(model: nn.Module) -> Callable[[], Tensor]:
    batch = torch.randn(5, 6, generator=torch.Generator().manual_seed(1))
    return lambda: model(batch).square().mean()


def zero_root(x: Tensor) -> Tensor:
    """The square root of nought: finite forward, infinite backward."""
    return torch.sqrt(x * 0)


class Scaled(nn.Module):
    """A weight whose gradient alone is infinite."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.zeros(6))

    def forward(self, x: Tensor) -> Tensor:
        return x.detach() * self.scale.sqrt()


@pytest.mark.parametrize(
    ("model", "expected"),
    [
        (layers(Planted(lambda x: x / 0)), "4.inner: its output is infinite"),
        (layers(Planted(lambda x: x * math.nan)), "4.inner: its output is NaN"),
        (layers(after=lambda x: x * math.inf), "4: what it passes to 4.out is NaN"),
        (layers(Planted(zero_root)), "4.inner: the gradient of its input is NaN"),
        (
            layers(after=lambda x: x + zero_root(x)),
            "4.relu: the gradient of its output is NaN, so what is computed from it goes wrong "
            "backwards",
        ),
        (layers(Scaled()), "4.inner.scale: its gradient is infinite"),
        (layers(), None),
    ],
)
def test_what_went_bad_first_is_named(model: nn.Module, expected: str | None) -> None:
    assert name_bad_module(model, step(model)) == expected


def test_a_weight_that_is_already_bad_is_named() -> None:
    model = tiny_bundle().model
    images, tokens = torch.rand(4, 3, 16, 16), torch.randint(1, 90, (4, 8))
    model.text_tower.head.weight.data[3, 2] = math.nan
    named = name_bad_module(model, lambda: model(images, tokens).image_features.sum())
    assert named == "text_tower.head.weight: it is NaN before the step"
    model.image_tower.head.bias.data[0] = math.inf
    named = name_bad_module(model, lambda: model(images, tokens).image_features.sum())
    assert named == (
        "image_tower.head.bias: it is infinite before the step, and so are 1 more weights"
    )


def test_bad_pictures_and_a_bad_loss_are_told_from_a_bad_model() -> None:
    model = tiny_bundle().model
    images, tokens = torch.rand(4, 3, 16, 16), torch.randint(1, 90, (4, 8))

    def loss(power: float = 1.0) -> Tensor:
        output = model(images, tokens)
        return (output.image_features * output.text_features).sum() * power

    assert name_bad_module(model, loss) is None
    named = name_bad_module(model, lambda: loss(math.inf))
    assert named == "the loss: it is infinite while every module's output is finite"
    images[2, 1, 3, 3] = math.nan
    assert name_bad_module(model, loss) == "the batch: it is NaN"


def test_nothing_is_left_behind() -> None:
    model = nn.Sequential(nn.Linear(6, 6), nn.BatchNorm1d(6), nn.Dropout(0.5), Planted(zero_root))
    run = step(model)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    random = torch.get_rng_state()
    assert name_bad_module(model, run) == "3: the gradient of its input is NaN"
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), random)
    for parameter in model.parameters():
        assert torch.equal(parameter.grad, torch.ones_like(parameter))
        assert not parameter._backward_hooks
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_masks_may_hold_negative_infinities() -> None:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(6, 2, 12, dropout=0.0, batch_first=True)
    mask = nn.Transformer.generate_square_subsequent_mask(5)
    layer.register_buffer("mask", mask)
    batch = torch.randn(2, 5, 6)
    assert name_bad_module(layer, lambda: layer(batch, src_mask=layer.mask).sum()) is None
    layer.linear1.weight.data.fill_(1e30)
    layer.linear2.weight.data.fill_(1e30)
    named = name_bad_module(layer, lambda: layer(batch, src_mask=layer.mask).sum())
    assert named == "linear2: its output is infinite"


def test_under_gradient_checkpointing_the_same_is_named() -> None:
    model = layers(Planted(zero_root))
    batch = torch.randn(5, 6)

    def run() -> Tensor:
        x = model[0](batch)
        for block in model[2:]:
            x = checkpoint(block, x, use_reentrant=False)
        return x.square().mean()

    assert name_bad_module(model, run) == "4.inner: the gradient of its input is NaN"


def test_what_breaks_the_forward_pass_does_not_hide_what_was_found() -> None:
    model = layers(Planted(lambda x: x / 0))

    def run() -> Tensor:
        loss = step(model)()
        raise RuntimeError(f"out of memory, say, at {loss.item()}")

    assert name_bad_module(model, run) == "4.inner: its output is infinite"


def test_bf16_autocast_names_the_same() -> None:
    model = layers(Planted(lambda x: x.float() / 0))
    run = step(model)

    def autocast() -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return F.mse_loss(run(), torch.zeros(()))

    assert name_bad_module(model, autocast) == "4.inner: its output is infinite"
