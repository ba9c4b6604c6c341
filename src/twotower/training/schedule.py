"""The learning rate over time: a function of the step, and what validation makes of it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from twotower.train_config import Schedule, TrainConfig


def learning_rate(step: int, total_steps: int, config: TrainConfig) -> float:
    """The rate of step `step` (from 0): a linear rise to `config.lr`, then the schedule.

    cosine and linear end at 0; constant and plateau stay, plateau times `Plateau.scale`.
    """
    warmup = round(config.warmup_fraction * total_steps)
    if step < warmup:
        return config.lr * (step + 1) / warmup
    progress = (step - warmup) / max(1, total_steps - warmup)
    if config.schedule is Schedule.cosine:
        return config.lr * 0.5 * (1 + math.cos(math.pi * progress))
    if config.schedule is Schedule.linear:
        return config.lr * (1 - progress)
    return config.lr


@dataclass(kw_only=True)
class Plateau:
    """Lowers the rate when validation no longer improves, as torch's ReduceLROnPlateau.

    Attributes:
        factor: of the rate, at each lowering.
        patience: validations without improvement that are let pass.
        min_change: smallest rise that is an improvement.
        scale: what the schedule's rate is multiplied by; 1 until the first lowering.
        best: the highest metric so far, None before the first.
        bad: validations without improvement since the last one, or since the last lowering.
    """

    factor: float
    patience: int
    min_change: float = 0.0
    scale: float = 1.0
    best: float | None = None
    bad: int = 0

    @classmethod
    def of(cls, config: TrainConfig) -> Plateau | None:
        """The one that a config asks for, or None."""
        if config.schedule is not Schedule.plateau:
            return None
        return cls(
            factor=config.plateau_factor,
            patience=config.plateau_patience,
            min_change=config.min_change,
        )

    def observe(self, metric: float) -> bool:
        """Take a validation's metric (higher is better); whether the rate was lowered by it."""
        if metric > (-math.inf if self.best is None else self.best + self.min_change):
            self.best, self.bad = metric, 0
            return False
        self.bad += 1
        if self.bad <= self.patience:
            return False
        self.scale, self.bad = self.scale * self.factor, 0
        return True

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs, as JSON can hold it."""
        return {"scale": self.scale, "best": self.best, "bad": self.bad}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from what `state_dict` gave."""
        self.scale, self.best, self.bad = state["scale"], state["best"], state["bad"]
