"""The gradient of one global batch, whatever part of it passes through the towers at once.

With micro-batches the features are cached (GradCache, Gao et al. 2021): all features are computed
without a graph, the loss gives their gradients, and a second pass over each micro-batch carries
those into the weights. The result is the gradient of the one big batch, `logit_scale` and the bias
included.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from twotower.distributed import all_gather_with_grad, rank
from twotower.evaluation.features import autocast
from twotower.models.dual_encoder import DualEncoder, DualEncoderOutput
from twotower.models.locking import running_statistics
from twotower.train_config import Precision
from twotower.training.loss import Loss, Pairs, Temperature, contrastive_loss


@dataclass(frozen=True, kw_only=True)
class Inputs:
    """This rank's part of a global batch, on the device: pictures, token ids, keys (B, 2)."""

    images: Tensor
    tokens: Tensor
    keys: Tensor

    def __len__(self) -> int:
        return len(self.images)


@dataclass(frozen=True, kw_only=True)
class Gradient:
    """Computes gradients of a model: the loss, and how the batch passes through the towers.

    Attributes:
        model: the dual encoder whose parameters get the gradient.
        parallel: the same wrapped in DDP, or the model itself.
        loss: what is minimised.
        precision: what the towers compute in; the loss is in the features' fp32 (or fp64).
        micro_batch_size: pairs that pass through the towers at once; 0 is all.
        scale: applied to the loss before its backward pass (a gradient scaler's).
    """

    model: DualEncoder
    parallel: nn.Module
    loss: Loss
    device: torch.device
    precision: Precision = Precision.fp32
    micro_batch_size: int = 0
    scale: Callable[[Tensor], Tensor] = lambda loss: loss

    def backward(self, batch: Inputs) -> tuple[Tensor, DualEncoderOutput]:
        """Add the gradient of the global batch to the parameters'; every rank calls it.

        Returns:
            This rank's loss and outputs, detached.
        """
        if 0 < self.micro_batch_size < len(batch):
            return self._in_micro_batches(batch)
        output = self.forward(self.parallel, batch, slice(None))
        loss = self.value(output, batch.keys)
        self.scale(loss).backward()  # type: ignore[no-untyped-call]
        return loss.detach(), _detached(output)

    def value(self, output: DualEncoderOutput, keys: Tensor) -> Tensor:
        """The loss of this rank's rows against every rank's columns."""
        image, text = output.image_features, output.text_features
        everyone = Pairs(
            all_gather_with_grad(image), all_gather_with_grad(text), all_gather_with_grad(keys)
        )
        return contrastive_loss(
            self.loss,
            Pairs(image, text, keys),
            everyone,
            Temperature(output.logit_scale, output.logit_bias),
            first_row=rank() * len(keys),
        )

    def forward(self, model: nn.Module, batch: Inputs, rows: slice) -> DualEncoderOutput:
        """Some rows of a batch through `model`, in the precision asked for; outputs in full."""
        with autocast(self.device, self.precision):
            output: DualEncoderOutput = model(batch.images[rows], batch.tokens[rows])
        return _full_precision(output)

    def _in_micro_batches(self, batch: Inputs) -> tuple[Tensor, DualEncoderOutput]:
        parts = _slices(len(batch), self.micro_batch_size)
        outputs, states = self._cached_outputs(batch, parts)
        cached = DualEncoderOutput(
            torch.cat([output.image_features for output in outputs]),
            torch.cat([output.text_features for output in outputs]),
            outputs[0].logit_scale,
            outputs[0].logit_bias,
        )
        leaves = DualEncoderOutput(*(part.detach().requires_grad_() for part in cached))
        loss = self.value(leaves, batch.keys)
        self.scale(loss).backward()  # type: ignore[no-untyped-call]
        image_grad, text_grad, *scalar_grads = (_gradient_of(leaf) for leaf in leaves)
        with _kept_statistics(self.model):
            for number, (rows, state) in enumerate(zip(parts, states, strict=True)):
                last = _is_last(number, parts)
                _set_random_state(state, self.device)
                with contextlib.nullcontext() if last else _unsynchronised(self.parallel):
                    output = self.forward(self.parallel, batch, rows)
                    towards = (output.image_features * image_grad[rows]).sum()
                    towards = towards + (output.text_features * text_grad[rows]).sum()
                    if last:  # the scalars are in every micro-batch's graph, and count once
                        for value, grad in zip(output[2:], scalar_grads, strict=True):
                            towards = towards + value * grad
                    towards.backward()  # type: ignore[no-untyped-call]
        return loss.detach(), _detached(leaves)

    @torch.no_grad()
    def _cached_outputs(
        self, batch: Inputs, parts: Sequence[slice]
    ) -> tuple[list[DualEncoderOutput], list[list[Tensor]]]:
        """Each micro-batch's outputs without a graph, and the random state that each began with."""
        outputs, states = [], []
        with _averaged_statistics(self.model) as count_one:
            for rows in parts:
                states.append(_random_state(self.device))
                with count_one():
                    outputs.append(self.forward(self.model, batch, rows))
        return outputs, states


def _slices(count: int, size: int) -> list[slice]:
    return [slice(start, min(start + size, count)) for start in range(0, count, size)]


def _is_last(number: int, parts: Sequence[slice]) -> bool:
    return number == len(parts) - 1


def _detached(output: DualEncoderOutput) -> DualEncoderOutput:
    return DualEncoderOutput(*(part.detach() for part in output))


def _full_precision(output: DualEncoderOutput) -> DualEncoderOutput:
    """The same in at least fp32: the sums over a large batch need its digits."""
    halves = (torch.bfloat16, torch.float16)
    return DualEncoderOutput(*(p.float() if p.dtype in halves else p for p in output))


def _gradient_of(leaf: Tensor) -> Tensor:
    return torch.zeros_like(leaf) if leaf.grad is None else leaf.grad


def _unsynchronised(parallel: nn.Module) -> AbstractContextManager[Any]:
    """DDP sums over ranks only in the backward pass that is not under this."""
    if isinstance(parallel, DistributedDataParallel):
        return parallel.no_sync()
    return contextlib.nullcontext()


def _random_state(device: torch.device) -> list[Tensor]:
    states = [torch.get_rng_state()]
    if device.type == "cuda":
        states.append(torch.cuda.get_rng_state(device))
    return states


def _set_random_state(states: Sequence[Tensor], device: torch.device) -> None:
    torch.set_rng_state(states[0])
    if device.type == "cuda":
        torch.cuda.set_rng_state(states[1], device)


@contextmanager
def _kept_statistics(model: nn.Module) -> Iterator[None]:
    """Within it forward passes leave no trace in the running statistics of batch norms."""
    buffers = running_statistics(model)
    before = [buffer.clone() for buffer in buffers]
    try:
        yield
    finally:
        for buffer, value in zip(buffers, before, strict=True):
            buffer.copy_(value)


@contextmanager
def _averaged_statistics(model: nn.Module) -> Iterator[Callable[[], AbstractContextManager[None]]]:
    """Within it running statistics change once: by the mean of what each micro-batch asks."""
    buffers = running_statistics(model)
    before = [buffer.clone() for buffer in buffers]
    sums = [torch.zeros_like(buffer) for buffer in buffers]
    seen = 0

    @contextmanager
    def count_one() -> Iterator[None]:
        nonlocal seen
        yield
        seen += 1
        for buffer, value, total in zip(buffers, before, sums, strict=True):
            total += buffer
            buffer.copy_(value)

    yield count_one
    for buffer, total in zip(buffers, sums, strict=True):
        buffer.copy_(total / max(1, seen))
