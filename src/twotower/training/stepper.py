"""One optimiser step after another: gradient, clipping, update, moving average."""

from __future__ import annotations

import math
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from twotower.distributed import all_gather_objects, average_over_ranks, world_size
from twotower.model_config import BatchNorm
from twotower.models.compiled import compile_towers
from twotower.models.dual_encoder import DualEncoder, DualEncoderOutput
from twotower.models.locking import apply_batch_norm_policy, running_statistics
from twotower.settings import Diverged
from twotower.train_config import Precision, TrainConfig
from twotower.training.average import WeightAverage
from twotower.training.bad_module import name_bad_module
from twotower.training.gradient import Gradient, Inputs
from twotower.training.loss import Loss, Pairs, Temperature, contrastive_loss
from twotower.training.optim import (
    build_optimizer,
    load_optimizer_tensors,
    optimizer_tensors,
    set_learning_rate,
)
from twotower.training.towers import enable_grad_checkpointing, encode_in_parts

OPTIMIZER, AVERAGE = "optimizer.", "average."  # begin the names of tensors that a resume needs
MOST_SKIPPED = 40  # steps in a row: the fp16 scale, 2**16 at first, is below 2**-23 by then


class StepResult(NamedTuple):
    """What a step was.

    Attributes:
        loss: of the global batch.
        grad_norm: before clipping.
        logit_scale: the factor of the cosines.
        output: this rank's, detached.
    """

    loss: float
    grad_norm: float
    logit_scale: float
    output: DualEncoderOutput


class Stepper:
    """Everything that a step changes: weights, optimiser, scaler, moving average.

    Args:
        model: what is trained, on its device.
        batch_norm: the policy for its batch norms.
        loss: what is minimised.
        config: the optimisation.
        device: where the steps run.

    Raises:
        ConfigError: a setting does not fit the model or the device.
    """

    def __init__(
        self,
        model: DualEncoder,
        batch_norm: BatchNorm,
        loss: Loss,
        config: TrainConfig,
        device: torch.device,
    ) -> None:
        self.model, self.config, self.device = model, config, device
        world, micro = world_size(), config.micro_batch_size
        apply_batch_norm_policy(model, batch_norm, world, 0 < micro < config.batch_size // world)
        if config.grad_checkpointing:
            enable_grad_checkpointing(model)
        if config.compile:
            compile_towers(model, device, "train.compile")
        statistics = running_statistics(model)
        if device.type == "cpu" and (batch_norm is BatchNorm.frozen or not statistics):
            encode_in_parts(model)
        # The counters are the same on all ranks, means and variances of local norms are not.
        local = batch_norm is BatchNorm.local
        self.statistics = [b for b in statistics if local and b.is_floating_point()]
        self.optimizer = build_optimizer(model, config)
        self.average = WeightAverage.of(model, config)
        self._skipped = 0
        self.scaler = torch.amp.GradScaler(device.type, enabled=config.precision is Precision.fp16)
        parallel: nn.Module = model
        if world > 1:
            ids = [device.index] if device.type == "cuda" else None
            parallel = DistributedDataParallel(model, device_ids=ids)
        self.gradient = Gradient(
            model=model,
            parallel=parallel,
            loss=loss,
            device=device,
            precision=config.precision,
            micro_batch_size=micro,
            scale=self.scaler.scale,
        )

    def train(self) -> None:
        """Switch the model to training."""
        self.gradient.parallel.train()

    def step(self, batch: Inputs, rate: float) -> StepResult:
        """Forward, loss, backward, clip, update; every rank calls it with its part of the batch.

        Raises:
            Diverged: the loss is not finite; the weights are those before the step.
        """
        set_learning_rate(self.optimizer, rate)
        self.optimizer.zero_grad()
        loss, output = self.gradient.backward(batch)
        self.scaler.unscale_(self.optimizer)
        limit = self.config.grad_clip_norm or math.inf
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), limit)
        seen = torch.stack([loss, norm, output.logit_scale])
        average_over_ranks([seen])
        # One wait for the device a step, before the weights change.
        value, size, factor = seen.tolist()
        # The fp16 scaler skips a step whose gradient is not finite, and lowers its scale.
        self._skipped = 0 if math.isfinite(size) else self._skipped + 1
        allowed = MOST_SKIPPED if self.scaler.is_enabled() else 0
        if not math.isfinite(value) or self._skipped > allowed:
            raise Diverged(
                f"the loss is {value} and the gradient's norm {size}; {self.origin(batch)}"
            )
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.model.clamp_logit_scale()
        average_over_ranks(self.statistics)
        if self.average is not None:
            self.average.update()
        return StepResult(value, size, factor, output)

    def origin(self, batch: Inputs) -> str:
        """What went bad first, found by running the batch again; every rank calls it.

        The model is not to be trained on afterwards.
        """
        for part in self.model.modules():
            if isinstance(part, nn.SyncBatchNorm):
                part.eval()  # ranks stop at different modules and must not wait for each other
        size = self.config.micro_batch_size or len(batch)
        found = None
        for start in range(0, len(batch), size):
            rows = slice(start, start + size)
            found = found or name_bad_module(self.model, lambda rows=rows: self.alone(batch, rows))  # type: ignore[misc]
        of_ranks = [name for name in all_gather_objects(found) if name]
        return f"first bad: {of_ranks[0]}" if of_ranks else "run again, every module was finite"

    def alone(self, batch: Inputs, rows: slice) -> Tensor:
        """The loss of some pairs among themselves, without other ranks."""
        output = self.gradient.forward(self.model, batch, rows)
        pairs = Pairs(output.image_features, output.text_features, batch.keys[rows])
        temperature = Temperature(output.logit_scale, output.logit_bias)
        return contrastive_loss(self.gradient.loss, pairs, pairs, temperature)

    def averaged(self) -> AbstractContextManager[None]:
        """Within it the model has the averaged weights, where there are any."""
        return nullcontext() if self.average is None else self.average.swapped()

    def tensors(self) -> dict[str, Tensor]:
        """What a resumed run needs besides the weights."""
        tensors = {f"{OPTIMIZER}{k}": v for k, v in optimizer_tensors(self.optimizer).items()}
        if self.average is not None:
            tensors |= {f"{AVERAGE}{k}": v for k, v in self.average.state_dict().items()}
        return tensors

    def load_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        """Put back what `tensors` gave."""
        load_optimizer_tensors(self.optimizer, _below(OPTIMIZER, tensors))
        if self.average is not None:
            self.average.load_state_dict(_below(AVERAGE, tensors))


def _below(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    own = {name: tensor for name, tensor in tensors.items() if name.startswith(prefix)}
    return {name.removeprefix(prefix): tensor for name, tensor in own.items()}
