"""Where a step's time goes, and alarms: told once, in time, with what to try."""

from __future__ import annotations

import itertools
import logging
import math

import pytest
import torch
import torch.nn.functional as F

from twotower.train_config import TrainConfig
from twotower.training import health
from twotower.training.health import CollapseAlarm, StepClock, spread

CPU = torch.device("cpu")


class Watch:
    """Time that passes only when told to."""

    def __init__(self, monkeypatch):
        self.now = 0.0
        monkeypatch.setattr(health.time, "perf_counter", lambda: self.now)

    def loader(self, waits):
        for wait in waits:
            self.now += wait
            yield wait


@pytest.fixture
def watch(monkeypatch):
    return Watch(monkeypatch)


def run(clock, watch, waits, moving=0.0, computing=1.0):
    for _ in clock.batches(watch.loader(waits)):
        with clock.moving():
            watch.now += moving
        watch.now += computing


def test_the_shares_are_those_of_the_time(watch):
    clock = StepClock(CPU)
    assert clock.values() == {} and clock.note() == ""
    run(clock, watch, [3.0, 1.0, 2.0], moving=0.5, computing=1.5)
    assert clock.values() == {
        "time/data_share": pytest.approx(6 / 12),
        "time/transfer_share": pytest.approx(1.5 / 12),
        "time/compute_share": pytest.approx(4.5 / 12),
    }
    assert clock.note() == "waiting for data 50 %"


def test_the_shares_are_of_the_newest_steps_over_epochs(watch):
    clock = StepClock(CPU)
    run(clock, watch, [100.0] * 5)
    for _ in range(2):
        run(clock, watch, [0.0] * (health.WINDOW // 2))
    assert clock.values()["time/data_share"] == 0.0
    assert clock.note() == ""


def test_a_step_that_is_broken_off_is_not_counted(watch):
    clock = StepClock(CPU)
    run(clock, watch, [1.0])
    for _ in clock.batches(watch.loader([50.0, 50.0])):
        break
    assert clock.values()["time/data_share"] == pytest.approx(0.5)


@pytest.mark.parametrize(
    ("cores", "workers", "ranks", "advice"),
    [
        (16, 0, 1, "raise train.num_workers (now 0; this machine has 16 cores)"),
        (16, 3, 4, "raise train.num_workers (now 3; this machine has 16 cores for 4 processes)"),
        (16, 16, 1, "train.num_workers is 16 and this machine has 16 cores, so make the loading"),
        (1, 1, 1, "train.num_workers is 1 and this machine has 1 core, so make the loading"),
    ],
)
def test_waiting_for_pictures_is_said_once(watch, monkeypatch, cores, workers, ranks, advice):
    monkeypatch.setattr(health.os, "sched_getaffinity", lambda pid: set(range(cores)))
    clock = StepClock(CPU, workers, ranks)
    run(clock, watch, [30.0] + [0.75] * (health.ENOUGH - 1), computing=0.25)
    assert clock.sentence() == "", "not before enough steps, the first not counted"
    run(clock, watch, [30.0, 0.75], computing=0.25)
    assert clock.sentence().startswith(f"training waits 75 % of the time for pictures; {advice}")
    assert clock.sentence() == ""


@pytest.mark.parametrize(("wait", "told"), [(0.28, False), (0.32, True)])
def test_the_start_of_the_workers_is_no_bottleneck(watch, wait, told):
    clock = StepClock(CPU)
    for _ in range(4):
        run(clock, watch, [90.0] + [wait] * 9, computing=1 - wait)
    assert clock.values()["time/data_share"] > 0.8
    assert bool(clock.sentence()) == told


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_copies_to_a_gpu_are_timed_without_waiting():
    device = torch.device("cuda")
    clock = StepClock(device)
    batch = torch.zeros(64, 3, 224, 224).pin_memory()
    for _ in clock.batches(range(5)):
        with clock.moving():
            moved = batch.to(device, non_blocking=True)
        moved.sum().item()
    values = clock.values()
    assert 0 < values["time/transfer_share"] < 1
    assert sum(values.values()) == pytest.approx(1)


@pytest.mark.parametrize("count", [1, 2, 7])
def test_the_spread_is_one_less_the_mean_cosine_of_two(count):
    features = F.normalize(torch.randn(count, 5, generator=torch.Generator().manual_seed(0)) + 0.5)
    pairs = list(itertools.permutations(range(count), 2))
    mean = sum(float(features[i] @ features[j]) for i, j in pairs) / max(1, len(pairs))
    assert float(spread(features)) == pytest.approx(1 - mean, abs=1e-6)
    same = features[:1].expand(count, 5)
    assert float(spread(same)) == pytest.approx(0.0 if count > 1 else 1.0, abs=1e-6)


def alarm(steps=200):
    """An alarm whose warm-up is over at step 20; it warns after 50 steps."""
    return CollapseAlarm(TrainConfig(warmup_fraction=20 / steps, lr=0.25), steps)


def warnings(caplog):
    return [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]


@pytest.mark.parametrize(
    ("loss", "told"), [(0.981 * math.log(64), 1), (5.0, 1), (0.979 * math.log(64), 0)]
)
def test_a_loss_that_stays_at_chance_is_told_once(caplog, loss, told):
    watched = alarm()
    for step in range(200):
        watched.step(step, loss, math.log(64), 14.0)
        if step < 70:
            assert warnings(caplog) == [], "not in the warm-up, nor soon after it"
    assert len(warnings(caplog)) == told
    if told:
        assert "(ln N = 4.16) for 51 steps" in warnings(caplog)[0]
        assert "a lower train.lr (now 0.25)" in warnings(caplog)[0]


def test_a_loss_that_leaves_chance_at_times_is_not_told(caplog):
    watched = alarm()
    for step in range(200):
        watched.step(step, 1.0 if step % 40 == 0 else 4.2, math.log(64), 14.0)
        watched.step(step, 4.2, None, 14.0)
    assert warnings(caplog) == []


def test_patience_grows_with_the_run(caplog):
    watched = alarm(10_000)
    for step in range(20, 521):
        assert warnings(caplog) == []
        watched.step(step, 9.0, math.log(64), 14.0)
    assert "for 501 steps" in warnings(caplog)[0]


@pytest.mark.parametrize(("free", "told"), [(30, 1), (0, 0)])
def test_a_scale_that_came_to_its_limit_is_told_but_not_one_that_started_there(caplog, free, told):
    watched = alarm()
    for step in range(20, 200):
        watched.step(step, 0.1, math.log(64), 90.0 if step - 20 < free else 100.0)
    assert len(warnings(caplog)) == told
    assert all("logit_scale has been at its limit of 100 for 51" in w for w in warnings(caplog))


def test_features_that_are_all_the_same_are_told_by_tower(caplog):
    generator = torch.Generator().manual_seed(0)
    good = F.normalize(torch.randn(16, 32, generator=generator))
    flat = F.normalize(torch.ones(16, 32) + 0.05 * torch.randn(16, 32, generator=generator))
    watched = alarm()
    for step in range(0, 200, 10):
        values = watched.features(step, good, flat)
        if step < 70:
            assert warnings(caplog) == []
    assert values["health/image_spread"] == pytest.approx(1, abs=0.1)
    assert 0 < values["health/text_spread"] < health.COLLAPSED
    (warning,) = warnings(caplog)
    assert warning.startswith("the text features have been nearly all the same for 51 steps (mean")
    assert "train.text_lr_scale" in warning
