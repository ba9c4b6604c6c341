"""The averaged weights equal torch's own average, and a swap or a resumption changes no bit."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel

from tests.helpers import tiny_bundle
from twotower.models.dual_encoder import DualEncoder
from twotower.train_config import TrainConfig
from twotower.training.average import WeightAverage


def small(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5), nn.ReLU(), nn.Linear(5, 3))


def make(decay: float = 0.7) -> tuple[nn.Module, torch.optim.Optimizer, WeightAverage]:
    model = small()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    return model, optimizer, WeightAverage(model, decay)


def step(model: nn.Module, optimizer: torch.optim.Optimizer, number: int) -> None:
    x = torch.randn(8, 6, generator=torch.Generator().manual_seed(number))
    optimizer.zero_grad()
    model(x).square().mean().backward()
    optimizer.step()


def state(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def assert_same(one, other):
    assert one.keys() == other.keys()
    for name in one:
        assert torch.equal(one[name], other[name]), name


def test_it_equals_torchs_averaged_model_with_the_same_ramp():
    def ramp(averaged, current, count):
        # torch's first update is a copy and counts one more.
        decay = min(0.7, count / (9 + count))
        return averaged + (1 - decay) * (current - averaged)

    model, optimizer, average = make()
    reference = AveragedModel(model, avg_fn=ramp, use_buffers=True)
    reference.update_parameters(model)
    for number in range(40):
        step(model, optimizer, number)
        average.update()
        reference.update_parameters(model)
    with average.swapped():
        found = state(model)
    for name, expected in reference.module.state_dict().items():
        if name.endswith("num_batches_tracked"):
            continue
        torch.testing.assert_close(found[name], expected, rtol=1e-5, atol=1e-7)
        assert not torch.equal(found[name], model.state_dict()[name]), name


def test_a_swap_gives_the_weights_back_even_after_an_error():
    model, optimizer, average = make()
    for number in range(3):
        step(model, optimizer, number)
        average.update()
    before, averages = state(model), average.state_dict()
    averages = {name: tensor.clone() for name, tensor in averages.items()}
    with pytest.raises(RuntimeError), average.swapped():
        assert not torch.equal(model[0].weight, before["0.weight"])
        raise RuntimeError
    assert_same(state(model), before)
    assert_same(average.state_dict(), averages)


def test_training_around_a_swap_goes_on_as_without_it():
    finals = []
    for swap in (False, True):
        model, optimizer, average = make()
        for number in range(6):
            step(model, optimizer, number)
            average.update()
            if swap:
                with average.swapped():
                    model.eval()(torch.zeros(2, 6))
                model.train()
        finals.append({**state(model), **average.state_dict()})
    assert_same(*finals)


@pytest.mark.parametrize("stop", [0, 1, 4])
def test_a_resumed_average_equals_the_whole_one_bit_for_bit(stop):
    whole = make(0.99)
    for number in range(8):
        step(*whole[:2], number)
        whole[2].update()
    model, optimizer, average = make(0.99)
    for number in range(stop):
        step(model, optimizer, number)
        average.update()
    again = small(1)
    again.load_state_dict(state(model))
    resumed = torch.optim.AdamW(again.parameters(), lr=0.1)
    resumed.load_state_dict(optimizer.state_dict())
    kept = WeightAverage(again, 0.99)
    kept.load_state_dict({name: tensor.clone() for name, tensor in average.state_dict().items()})
    for number in range(stop, 8):
        step(again, resumed, number)
        kept.update()
    assert_same(kept.state_dict(), whole[2].state_dict())
    assert_same(state(again), state(whole[0]))


def test_a_locked_trunk_is_not_averaged_and_the_bundle_has_the_swapped_weights():
    bundle = tiny_bundle(locked=True)
    average = WeightAverage.of(bundle.model, TrainConfig(ema_decay=0.9))
    assert average is not None
    assert set(average.averages) == {
        "logit_scale",
        *(f"{side}_tower.head.{name}" for side in ("image", "text") for name in ("weight", "bias")),
    }
    heads = DualEncoder(bundle.model.image_tower.head, bundle.model.text_tower.head)
    average = WeightAverage(heads, 0.9)
    average.averages["image_tower.bias"].fill_(7)
    with average.swapped():
        assert bundle.model.state_dict()["image_tower.head.bias"].tolist() == [7.0] * 12
    assert WeightAverage.of(bundle.model, TrainConfig()) is None


def test_a_buffer_that_no_checkpoint_has_is_left_alone():
    model = small()
    model.register_buffer("mask", torch.full((2,), -torch.inf), persistent=False)
    average = WeightAverage(model, 0.5)
    average.update()
    with average.swapped():
        assert model.mask.tolist() == [-torch.inf] * 2
    assert "mask" not in average.averages and "1.running_var" in average.averages
