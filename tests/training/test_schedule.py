"""The learning rate's shape, and its lowering when validation stands still."""

from __future__ import annotations

import json
import math
import random

import pytest
import torch

from twotower.train_config import Schedule, TrainConfig
from twotower.training.schedule import Plateau, learning_rate


def rates(schedule: Schedule, warmup: float = 0.1) -> list[float]:
    config = TrainConfig(lr=2.0, warmup_fraction=warmup, schedule=schedule)
    return [learning_rate(step, 100, config) for step in range(101)]


@pytest.mark.parametrize("schedule", list(Schedule))
def test_the_rate_rises_linearly_to_its_peak(schedule):
    found = rates(schedule)
    assert found[:10] == pytest.approx([0.2 * (i + 1) for i in range(10)])
    assert found[10] == 2.0
    assert rates(schedule, 0.0)[0] == 2.0
    assert rates(schedule, 1.0)[99] == 2.0


def test_cosine_equals_torchs():
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=2.0)
    reference = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=90)
    for rate in rates(Schedule.cosine)[10:]:
        assert rate == pytest.approx(optimizer.param_groups[0]["lr"], abs=1e-12)
        optimizer.step()
        reference.step()
    assert rates(Schedule.cosine)[55] == pytest.approx(1 + math.cos(math.pi / 2))


def test_linear_falls_to_zero_and_constant_stays():
    assert rates(Schedule.linear)[10:] == pytest.approx([2 * (1 - i / 90) for i in range(91)])
    assert set(rates(Schedule.constant)[10:]) == set(rates(Schedule.plateau)[10:]) == {2.0}


def test_only_plateau_has_one():
    made = [Plateau.of(TrainConfig(schedule=schedule)) for schedule in Schedule]
    assert [plateau is not None for plateau in made] == [False, False, False, True]


@pytest.mark.parametrize("min_change", [0.0, 0.6])
@pytest.mark.parametrize("patience", [0, 1, 3])
def test_plateau_lowers_when_torchs_does(patience, min_change):
    config = TrainConfig(
        schedule=Schedule.plateau,
        plateau_patience=patience,
        plateau_factor=0.7,
        min_change=min_change,
    )
    plateau = Plateau.of(config)
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    reference = torch.optim.lr_scheduler.ReduceLROnPlateau(
        optimizer,
        mode="max",
        factor=0.7,
        patience=patience,
        threshold=min_change,
        threshold_mode="abs",
        eps=0,
    )
    draw = random.Random(3)
    metrics = [math.nan] + [draw.gauss(min(step, 12), 1.5) for step in range(60)] + [math.nan] * 5
    for metric in metrics:
        before = plateau.scale
        lowered = plateau.observe(metric)
        reference.step(metric)
        assert plateau.scale == optimizer.param_groups[0]["lr"]
        assert lowered == (plateau.scale < before)
    assert plateau.scale < 0.7**3


def test_a_resumed_plateau_goes_on_as_the_whole_one():
    metrics = [1.0, 3.0, 2.0, 2.5, 2.9, 2.0, 3.5, 3.0, 3.1, 3.2]
    for stop in range(len(metrics)):
        whole, first, second = (Plateau(factor=0.5, patience=1) for _ in range(3))
        for metric in metrics[:stop]:
            first.observe(metric)
        second.load_state_dict(json.loads(json.dumps(first.state_dict(), allow_nan=False)))
        for metric in metrics[stop:]:
            second.observe(metric)
        for metric in metrics:
            whole.observe(metric)
        assert second == whole
