"""Which parameters decay, and the learning rate's shape."""

import math

import pytest

from tests.helpers import tiny_bundle
from twotower.train_config import TrainConfig
from twotower.training.optim import build_optimizer, learning_rate


def test_norms_biases_and_the_temperature_do_not_decay():
    model = tiny_bundle().model
    decayed, kept = build_optimizer(model, TrainConfig(weight_decay=0.3)).param_groups
    names = {id(p): name for name, p in model.named_parameters()}
    assert decayed["weight_decay"] == 0.3 and kept["weight_decay"] == 0.0
    assert {names[id(p)] for p in kept["params"]} == {n for n in names.values() if "bias" in n} | {
        "logit_scale"
    }
    assert len(decayed["params"]) + len(kept["params"]) == len(names)


def test_a_locked_trunk_is_not_in_the_optimiser():
    model = tiny_bundle(locked=True).model
    groups = build_optimizer(model, TrainConfig()).param_groups
    optimised = {id(p) for group in groups for p in group["params"]}
    heads = [*model.image_tower.head.parameters(), *model.text_tower.head.parameters()]
    assert optimised == {id(p) for p in [*heads, model.logit_scale]}


def test_warm_up_then_cosine_to_zero():
    config = TrainConfig(lr=2.0, warmup_fraction=0.1)
    rates = [learning_rate(step, 100, config) for step in range(101)]
    assert rates[:10] == pytest.approx([0.2 * (i + 1) for i in range(10)])
    assert rates[10] == 2.0 and rates[100] == pytest.approx(0, abs=1e-12)
    for step in (30, 55, 80):
        assert rates[step] == pytest.approx(1 + math.cos(math.pi * (step - 10) / 90))
