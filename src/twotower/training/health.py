"""The health of a run: where a step's time goes, and alarms when nothing is learned."""

from __future__ import annotations

import logging
import os
import time
from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from twotower.train_config import TrainConfig

log = logging.getLogger(__name__)

T = TypeVar("T")

WINDOW = 50  # steps that a share of time is a mean of
ENOUGH = 20  # steps before the input is called the bottleneck
WAITING = 0.3  # share of time spent waiting for data from which on it is
NEAR_CHANCE = 0.98  # a loss from this share of ln N on has learned next to nothing
MAX_SCALE = 100.0  # logit_scale is clamped here (Radford et al. 2021)
COLLAPSED = 0.01  # spread under which features are nearly all the same


@dataclass
class _Step:
    """Seconds of one step; `first` of its epoch, for which the loader starts its workers."""

    data: float = 0.0
    transfer: float = 0.0
    total: float = 0.0
    first: bool = False


class StepClock:
    """Where a step's time goes: waiting for data, moving it to the device, computing.

    Nothing here waits for a GPU: copies are timed by events that are read when they have passed.
    The rest of a step counts as computing, so the loop should wait for its own result once a step,
    as reading the loss does; time spent waiting for other ranks counts as computing too.

    Args:
        device: where the steps run.
        num_workers: loader processes a rank.
        ranks: ranks on this machine, among which its cores are shared.
    """

    def __init__(self, device: torch.device, num_workers: int = 0, ranks: int = 1) -> None:
        self._cuda = device.type == "cuda"
        self._workers, self._ranks = num_workers, ranks
        self._steps: deque[_Step] = deque(maxlen=WINDOW)
        self._now = _Step()
        self._copies: deque[tuple[torch.cuda.Event, torch.cuda.Event]] = deque()
        self._told = False

    def batches(self, loader: Iterable[T]) -> Iterator[T]:
        """The batches of an epoch; a step lasts from asking for one to asking for the next."""
        source = iter(loader)
        first = True
        while True:
            self._now = _Step(first=first)
            start = time.perf_counter()
            try:
                batch = next(source)
            except StopIteration:
                return
            self._now.data = time.perf_counter() - start
            yield batch
            self._collect_copies()
            self._now.total = time.perf_counter() - start
            self._steps.append(self._now)
            first = False

    @contextmanager
    def moving(self) -> Iterator[None]:
        """Around the copies of a batch to the device, however they are made."""
        if self._cuda:
            begin, end = _event(), _event()
            begin.record()
            yield
            end.record()
            self._copies.append((begin, end))
            return
        start = time.perf_counter()
        yield
        self._now.transfer += time.perf_counter() - start

    def _collect_copies(self) -> None:
        """Count the copies that are over; the others belong to a later step."""
        while self._copies and self._copies[0][1].query():  # type: ignore[no-untyped-call]
            begin, end = self._copies.popleft()
            self._now.transfer += begin.elapsed_time(end) / 1000

    def values(self) -> dict[str, float]:
        """Shares of the time of the newest steps, between 0 and 1; none before the first."""
        total = sum(step.total for step in self._steps)
        if not total:
            return {}
        data = sum(step.data for step in self._steps) / total
        transfer = sum(step.transfer for step in self._steps) / total
        return {
            "time/data_share": data,
            "time/transfer_share": transfer,
            "time/compute_share": max(0.0, 1 - data - transfer),
        }

    def note(self) -> str:
        """For the progress line, from a tenth of the time on: `waiting for data 62 %`."""
        share = self.values().get("time/data_share", 0.0)
        return f"waiting for data {share:.0%}".replace("%", " %") if share >= 0.1 else ""

    def sentence(self) -> str:
        """What to do about an input that is the bottleneck; said once, else empty."""
        # The first step of an epoch waits for workers to start, which more of them cannot help.
        steps = [step for step in self._steps if not step.first]
        share = sum(s.data for s in steps) / max(sum(s.total for s in steps), 1e-9)
        if self._told or len(steps) < ENOUGH or share <= WAITING:
            return ""
        self._told = True
        cores = len(os.sched_getaffinity(0))
        sharing = f" for {self._ranks} processes" if self._ranks > 1 else ""
        has = f"this machine has {cores} core{'s' if cores > 1 else ''}{sharing}"
        if (self._workers + 1) * self._ranks <= cores:
            advice = f"raise train.num_workers (now {self._workers}; {has})"
        else:
            advice = (
                f"train.num_workers is {self._workers} and {has}, so make the loading cheaper: "
                "pictures stored near the size that the model takes, on a fast local disk, or "
                "locked towers with train.cache_features=true"
            )
        return f"training waits {100 * share:.0f} % of the time for pictures; {advice}"


def _event() -> torch.cuda.Event:
    return torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]


def spread(features: Tensor) -> Tensor:
    """How far unit-norm features (N, D) point apart: 1 less the mean cosine of two of them.

    0 where all are the same, about 1 where they are at random. From the norm of their sum s alone:
    the mean cosine over pairs i != j is (|s|^2 - N) / (N (N - 1)).
    """
    count = len(features)
    squared = features.detach().float().sum(0).square().sum()
    return 1 - (squared - count) / max(1, count * (count - 1))


class CollapseAlarm:
    """Warns, once each and with what to try, of a run that learns nothing or has collapsed.

    Args:
        config: the optimisation, which says when the warm-up ends, and what the advice is about.
        total_steps: of the run. A state is alarming from a twentieth of them on, at least 50.
    """

    def __init__(self, config: TrainConfig, total_steps: int) -> None:
        self._config = config
        self._warm = round(config.warmup_fraction * total_steps)
        self._patience = max(50, total_steps // 20)
        self._since: dict[str, int] = {}
        self._told: set[str] = set()
        self._scale_was_free = False

    def step(self, step: int, loss: float, chance: float | None, logit_scale: float) -> None:
        """Look at one step's values.

        Args:
            step: its number.
            loss: as it was minimised.
            chance: what guessing costs, ln N for the softmax over N pairs; None where unknown.
            logit_scale: the factor of the cosines, not its logarithm.
        """
        if step < self._warm:
            return
        if chance and (steps := self._alarming("chance", step, loss >= NEAR_CHANCE * chance)):
            log.warning(
                "the loss has been that of guessing (ln N = %.2f) for %d steps, so nothing is "
                "learned: try a lower train.lr (now %g) or a longer train.warmup_fraction (now "
                "%g), and look whether captions belong to their pictures",
                *(chance, steps, self._config.lr, self._config.warmup_fraction),
            )
        # OpenAI's weights come with a scale at the limit: only one that arrived there is news.
        at_limit = logit_scale >= 0.999 * MAX_SCALE
        self._scale_was_free |= not at_limit
        if steps := self._alarming("scale", step, at_limit and self._scale_was_free):
            log.warning(
                "logit_scale has been at its limit of %g for %d steps: the training pairs are "
                "nearly told apart; usual late on millions of pairs, while on fewer they are being "
                "learned by heart: try train.early_stopping=true, a lower train.lr, stronger crops "
                "(model.crop_min_scale) or more data",
                *(MAX_SCALE, steps),
            )

    def features(self, step: int, image: Tensor, text: Tensor) -> dict[str, float]:
        """Look at a step's unit-norm features (N, D) of both towers; one wait for the device.

        Returns:
            `health/image_spread` and `health/text_spread`, by `spread`.
        """
        spreads = torch.stack([spread(image), spread(text)]).tolist()
        for name, value in zip(("image", "text"), spreads, strict=True):
            collapsed = step >= self._warm and value < COLLAPSED
            if steps := self._alarming(name, step, collapsed):
                log.warning(
                    "the %s features have been nearly all the same for %d steps (mean cosine %.3f):"
                    " the tower has collapsed; try a lower train.lr (now %g) or train.%s_lr_scale, "
                    "a longer train.warmup_fraction, or a larger train.batch_size",
                    *(name, steps, 1 - value, self._config.lr, name),
                )
        return {"health/image_spread": spreads[0], "health/text_spread": spreads[1]}

    def _alarming(self, what: str, step: int, bad: bool) -> int:
        """For how many steps something has been bad, when that is to be told; else 0."""
        if not bad:
            self._since.pop(what, None)
            return 0
        steps = step - self._since.setdefault(what, step) + 1
        if steps <= self._patience or what in self._told:
            return 0
        self._told.add(what)
        return steps
