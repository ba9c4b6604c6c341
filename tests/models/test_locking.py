from __future__ import annotations

import logging

import pytest
import torch
from torch import nn

from twotower.model_config import BatchNorm
from twotower.models.locking import (
    apply_batch_norm_policy,
    keep_in_evaluation,
    keep_locked_parts_in_evaluation,
    lock_all_but,
)
from twotower.settings import ConfigError


def small() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)
    )


def stages(model: nn.Sequential) -> list[list[nn.Parameter]]:
    return [list(model[:2].parameters()), list(model[2:].parameters())]


@pytest.mark.parametrize(("unlocked", "expected"), [(-1, 8), (2, 8), (1, 4), (0, 0)])
def test_the_last_stages_are_trained(unlocked: int, expected: int) -> None:
    model = small()
    lock_all_but(stages(model), unlocked, "model.x")
    trained = [parameter.requires_grad for parameter in model.parameters()]
    assert trained == [False] * (8 - expected) + [True] * expected


def test_more_stages_than_there_are_get_a_sentence() -> None:
    with pytest.raises(ConfigError) as raised:
        lock_all_but(stages(small()), 3, "model.image_unlocked_stages")
    assert str(raised.value) == (
        "model.image_unlocked_stages is 3, but this encoder has 2 stages; -1 trains all"
    )


def test_locked_parts_keep_their_statistics_and_drop_nothing() -> None:
    model = nn.Sequential(nn.Sequential(nn.Linear(5, 5), nn.Dropout(0.9)), small())
    for parameter in [*model[0].parameters(), *model[1][:2].parameters()]:
        parameter.requires_grad_(False)
    keep_locked_parts_in_evaluation(model)
    model.train()
    x = torch.randn(6, 5)
    assert torch.equal(model[0](x), model[0][0](x))
    before = [model[1][i].running_mean.clone() for i in (1, 3)]
    model[1](torch.randn(8, 3, 2, 2) + 1)
    assert torch.equal(model[1][1].running_mean, before[0])
    assert not torch.equal(model[1][3].running_mean, before[1])


def test_frozen_normalises_by_running_statistics_and_still_trains_the_weights() -> None:
    model, reference = small(), small().eval()
    for net in (model, reference):
        net[1].running_mean += 0.5
    apply_batch_norm_policy(model, BatchNorm.frozen, world_size=1)
    model.train()
    x = torch.randn(8, 3, 2, 2)
    assert torch.equal(model(x), reference(x))
    model(x).square().mean().backward()
    reference(x).square().mean().backward()
    for one, two in zip(model.parameters(), reference.parameters(), strict=True):
        assert one.grad is not None and two.grad is not None
        assert torch.equal(one.grad, two.grad) and one.grad.abs().sum() > 0
    assert torch.equal(model[1].running_mean, torch.full((4,), 0.5))


def test_local_changes_nothing_and_warns_of_several_ranks(
    caplog: pytest.LogCaptureFixture,
) -> None:
    model, reference = small().train(), small().train()
    with caplog.at_level(logging.WARNING):
        apply_batch_norm_policy(model, BatchNorm.local, world_size=1)
        apply_batch_norm_policy(nn.Linear(2, 2), BatchNorm.local, world_size=4)
        assert caplog.messages == []
        apply_batch_norm_policy(model, BatchNorm.local, world_size=4)
    assert len(caplog.messages) == 1 and "model.batch_norm=local" in caplog.messages[0]
    x = torch.randn(8, 3, 2, 2)
    assert torch.equal(model(x), reference(x))


def test_sync_on_cpus_is_refused_and_elsewhere_replaces_only_what_is_trained() -> None:
    model = small()
    apply_batch_norm_policy(model, BatchNorm.sync, world_size=1)
    with pytest.raises(ConfigError, match="model.batch_norm=sync needs GPUs"):
        apply_batch_norm_policy(model, BatchNorm.sync, world_size=2)
    model[1].requires_grad_(False)
    on_meta = model.to("meta")
    apply_batch_norm_policy(on_meta, BatchNorm.sync, world_size=2)
    assert type(on_meta[1]) is nn.BatchNorm2d
    assert isinstance(on_meta[3], nn.SyncBatchNorm)


def test_keeping_in_evaluation_outlives_train() -> None:
    model = nn.Sequential(nn.Dropout(0.5))
    keep_in_evaluation(model)
    model.train()
    assert torch.equal(model(torch.ones(100)), torch.ones(100))
