"""A moving average of the weights, which is what validation and the best checkpoint see."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from twotower.train_config import TrainConfig

UPDATES, WEIGHT = "updates", "weight."


class WeightAverage:
    """The exponential moving average of what a model trains (Polyak and Juditsky 1992).

    It holds trainable parameters and the floating-point buffers that a checkpoint has (running
    statistics), on their own device. The first averages are shorter, so that a short run is not
    left with its initial weights: update n (from 0) decays by min(decay, (1 + n) / (10 + n)).

    Args:
        model: what is averaged, on its final device; its tensors are kept, not the model.
        decay: how much of the average stays at each update, in [0, 1).
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay = decay
        self.updates = 0
        self.live = _averaged_tensors(model)
        self.averages = {name: tensor.clone() for name, tensor in self.live.items()}

    @classmethod
    def of(cls, model: nn.Module, config: TrainConfig) -> WeightAverage | None:
        """The one that a config asks for, or None."""
        return cls(model, config.ema_decay) if config.ema_decay else None

    @torch.no_grad()
    def update(self) -> None:
        """Take the model's present weights in; call it after each optimiser step."""
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        average = get_ema_multi_avg_fn(decay)  # type: ignore[no-untyped-call]
        average([*self.averages.values()], [*self.live.values()], self.updates)
        self.updates += 1

    @contextmanager
    def swapped(self) -> Iterator[None]:
        """Within it, the model has the averaged weights; afterwards its own, bit for bit."""
        own = {name: tensor.clone() for name, tensor in self.live.items()}
        try:
            _copy(self.averages, self.live)
            yield
        finally:
            _copy(own, self.live)

    def state_dict(self) -> dict[str, Tensor]:
        """What a resumed run needs: tensors by name."""
        weights = {f"{WEIGHT}{name}": tensor for name, tensor in self.averages.items()}
        return {UPDATES: torch.tensor(self.updates), **weights}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Go on from what `state_dict` gave of the same model."""
        self.updates = int(state[UPDATES])
        _copy({name: state[f"{WEIGHT}{name}"] for name in self.averages}, self.averages)


def _averaged_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Trainable parameters, and the floating-point buffers that a checkpoint holds."""
    parameters = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}
    saved = model.state_dict()
    buffers = {
        name: buffer
        for name, buffer in model.named_buffers()
        if name in saved and buffer.is_floating_point()
    }
    return parameters | buffers


@torch.no_grad()
def _copy(source: Mapping[str, Tensor], target: Mapping[str, Tensor]) -> None:
    for name, tensor in target.items():
        tensor.copy_(source[name])
