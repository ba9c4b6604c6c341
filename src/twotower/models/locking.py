"""Which parameters are trained, and which modules run as in evaluation meanwhile."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from twotower.distributed import is_main_process
from twotower.model_config import ALL, BatchNorm
from twotower.models.stages import encoder_stages
from twotower.settings import ConfigError

log = logging.getLogger(__name__)


def lock_all_but(stages: Sequence[Sequence[nn.Parameter]], unlocked: int, key: str) -> None:
    """Train the last `unlocked` of a trunk's stages and lock the rest; -1 trains all.

    Raises:
        ConfigError: there are fewer stages; `key` names the setting.
    """
    if unlocked == ALL:
        return
    if unlocked > len(stages):
        raise ConfigError(
            f"{key} is {unlocked}, but this encoder has {len(stages)} stages; -1 trains all"
        )
    for stage in stages[: len(stages) - unlocked]:
        for parameter in stage:
            parameter.requires_grad_(False)


def lock_stages(trunk: nn.Module, unlocked: int, side: str) -> None:
    """Train the last `unlocked` stages of an encoder; what is locked altogether is left to `Tower`.

    Raises:
        ConfigError: the encoder of this side (image or text) has fewer stages, or none.
    """
    if unlocked > 0:
        key = f"model.{side}_unlocked_stages"
        none = f"{key}: this {side} encoder has no stages; use -1 or 0"
        lock_all_but(encoder_stages(trunk, none), unlocked, key)


def _evaluate(module: nn.Module, _: Any) -> None:
    module.training = False


def keep_in_evaluation(module: nn.Module) -> None:
    """Let a module and what it holds run as in evaluation for good, whatever `train()` says."""
    for part in module.modules():
        part.training = False
        part.register_forward_pre_hook(_evaluate)


def keep_locked_parts_in_evaluation(trunk: nn.Module) -> None:
    """Let the locked parts of a trunk run as in evaluation: batch norm and dropout."""
    for part in trunk.children():
        parameters = list(part.parameters())
        if parameters and not any(parameter.requires_grad for parameter in parameters):
            keep_in_evaluation(part)
        else:
            keep_locked_parts_in_evaluation(part)


def trainable_batch_norms(model: nn.Module) -> list[tuple[nn.Module, str]]:
    """The batch norms that are trained, as (parent, attribute); locked towers have none."""
    found: list[tuple[nn.Module, str]] = []
    for name, child in model.named_children():
        if isinstance(child, _BatchNorm):
            if any(parameter.requires_grad for parameter in child.parameters()):
                found.append((model, name))
        else:
            found += trainable_batch_norms(child)
    return found


def running_statistics(model: nn.Module) -> list[Tensor]:
    """The means, variances and counters of the batch norms that are trained, in a fixed order."""
    norms = [getattr(parent, name) for parent, name in trainable_batch_norms(model)]
    return [buffer for norm in norms for buffer in norm.buffers()]


def apply_batch_norm_policy(
    model: nn.Module, policy: BatchNorm, world_size: int, in_micro_batches: bool = False
) -> None:
    """Make the batch norms of trainable towers follow `policy`; call it on the final device.

    frozen: they normalise by their running statistics, which stay as they are (their weights are
    still trained). sync: each step's statistics are those of the batch over all ranks. local: of
    each rank's own part, or of each micro-batch.

    Raises:
        ConfigError: sync over several ranks on CPUs, which torch does not offer, or with
            micro-batches, whose statistics are never those of the batch.
    """
    norms = trainable_batch_norms(model)
    if not norms:
        return
    if policy is BatchNorm.frozen:
        for parent, name in norms:
            keep_in_evaluation(getattr(parent, name))
    elif policy is BatchNorm.sync and in_micro_batches:
        raise ConfigError(
            "model.batch_norm=sync cannot be kept with train.micro_batch_size; use "
            "model.batch_norm=frozen, or train.micro_batch_size=0"
        )
    elif policy is BatchNorm.local and (world_size > 1 or in_micro_batches):
        if is_main_process():
            log.warning(
                "model.batch_norm=local: each %s normalises by its own part of the batch",
                "micro-batch" if in_micro_batches else f"of {world_size} ranks",
            )
    elif world_size > 1:
        _synchronise(norms)


def _synchronise(norms: Sequence[tuple[nn.Module, str]]) -> None:
    from timm.layers.norm_act import convert_sync_batchnorm

    for parent, name in norms:
        norm = getattr(parent, name)
        if next(norm.parameters()).device == torch.device("cpu"):
            raise ConfigError(
                "model.batch_norm=sync needs GPUs when there are several processes; "
                "use model.batch_norm=frozen or local"
            )
        setattr(parent, name, convert_sync_batchnorm(norm))  # type: ignore[no-untyped-call]
