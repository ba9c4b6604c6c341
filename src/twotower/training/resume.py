"""Exact resume: everything that decides the next step, kept in the same file as the weights."""

from __future__ import annotations

import signal
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from twotower.distributed import all_gather_objects, rank, world_size
from twotower.training.stepper import Stepper


@dataclass(kw_only=True)
class Progress:
    """Where a run stands.

    Attributes:
        step: optimiser steps done.
        validated: the step of the newest validation, -1 before the first.
        best: the best value of the watched validation metric so far; None before the first.
        stale: validations since it last improved by the smallest change that counts.
        compared: the value that an improvement is measured against.
        probe: the probe's metric before the first step; None without a probe.
        ended: why the run ended before its last step; empty if it did not.
        schedule: the state of the learning rate's schedule.
        seconds: time spent, over all attempts.
    """

    step: int = 0
    validated: int = -1
    best: float | None = None
    stale: int = 0
    compared: float | None = None
    probe: float | None = None
    ended: str = ""
    schedule: dict[str, Any] = field(default_factory=dict)
    seconds: float = 0.0

    def observe(self, value: float, min_change: float) -> bool:
        """Take note of the watched metric; whether it is the best so far."""
        if self.compared is None or value > self.compared + min_change:
            self.compared, self.stale = value, 0
        else:
            self.stale += 1
        better = self.best is None or value > self.best
        if better:
            self.best = value
        return better


def random_states() -> dict[str, Tensor]:
    """The random states of all ranks by name; every rank calls it."""
    states = [torch.get_rng_state()]
    if torch.cuda.is_available():
        states.append(torch.cuda.get_rng_state())
    return {
        f"rng.{number}.{device}": state
        for number, of_rank in enumerate(all_gather_objects(states))
        for device, state in zip(("cpu", "cuda"), of_rank, strict=False)
    }


def set_random_states(tensors: Mapping[str, Tensor]) -> None:
    """Put this rank's random states back, as `random_states` gave them."""
    torch.set_rng_state(tensors[f"rng.{rank()}.cpu"])
    if torch.cuda.is_available() and f"rng.{rank()}.cuda" in tensors:
        torch.cuda.set_rng_state(tensors[f"rng.{rank()}.cuda"])


def collect(progress: Progress, stepper: Stepper) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """What a checkpoint must hold besides the weights: tensors, and JSON; every rank calls it.

    Tensors are the optimiser's moments, the averaged weights and each rank's random state.
    """
    scaler = stepper.scaler.state_dict()
    about = {**asdict(progress), "scaler": scaler, "ranks": world_size()}
    return {**stepper.tensors(), **random_states()}, about


def restore(tensors: Mapping[str, Tensor], about: Mapping[str, Any], stepper: Stepper) -> Progress:
    """Put back what `collect` gave. With another number of ranks, random states start anew."""
    stepper.load_tensors(tensors)
    if about["scaler"]:
        stepper.scaler.load_state_dict(about["scaler"])
    if about["ranks"] == world_size():
        set_random_states(tensors)
    return Progress(**{name: about[name] for name in asdict(Progress())})


class StopRequest:
    """Remembers Ctrl-C or SIGTERM until the step is done, and asks the other ranks."""

    def __init__(self) -> None:
        self.signal = 0

    def remember(self, number: int, frame: FrameType | None) -> None:
        """The signal handler; a second signal does not wait."""
        if self.signal:
            raise KeyboardInterrupt
        self.signal = number

    def agreed(self, also: bool) -> tuple[int, bool]:
        """The signal that any rank got (0 is none), and whether any rank asks `also`."""
        if world_size() == 1:
            return self.signal, also
        device = "cuda" if dist.get_backend() == "nccl" else "cpu"
        asked = torch.tensor([self.signal, int(also)], device=device)
        dist.all_reduce(asked, op=dist.ReduceOp.MAX)
        return int(asked[0]), bool(asked[1])


@contextmanager
def stop_after_step() -> Iterator[StopRequest]:
    """Within it, SIGINT and SIGTERM wait for `StopRequest.agreed` instead of killing the step."""
    request = StopRequest()
    before = {
        number: signal.signal(number, request.remember)
        for number in (signal.SIGINT, signal.SIGTERM)
    }
    try:
        yield request
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
