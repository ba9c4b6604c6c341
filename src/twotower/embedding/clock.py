"""Where the time of an export goes: waiting for pictures, or computing."""

from __future__ import annotations

import os
import time
from collections.abc import Iterable, Iterator
from typing import TypeVar

T = TypeVar("T")

ENOUGH = 20  # batches before anything is said
WAITING = 0.5  # share of the time that makes the input the bottleneck


class InputClock:
    """Measures how long batches are waited for, against the time in which they are used."""

    def __init__(self) -> None:
        self.count = 0
        self.waited = 0.0
        self.total = 0.0

    def waiting(self, source: Iterable[T]) -> Iterator[T]:
        """The same batches; the first of a loader waits for its workers to start, and is left out.

        Time runs from asking for a batch to asking for the next one.
        """
        batches = iter(source)
        first = True
        while True:
            start = time.perf_counter()
            try:
                batch = next(batches)
            except StopIteration:
                return
            waited = time.perf_counter() - start
            yield batch
            if not first:
                self.count += 1
                self.waited += waited
                self.total += time.perf_counter() - start
            first = False

    @property
    def share(self) -> float:
        """The share of the time that was waited, between 0 and 1."""
        return self.waited / self.total if self.total else 0.0

    def note(self) -> str:
        """For the progress line, from a tenth of the time on: `waiting for pictures 62 %`."""
        return f"waiting for pictures {100 * self.share:.0f} %" if self.share >= 0.1 else ""

    def sentence(self, workers: int, ranks: int) -> str:
        """What limits the rate and what to do about it; empty after a few batches only."""
        if self.count < ENOUGH:
            return ""
        share = f"{100 * self.share:.0f} %"
        if self.share <= WAITING:
            return (
                f"the model is the bottleneck: pictures were waited for in {share} of the time; a "
                "GPU, more processes or encode.precision=bf16 would make it faster"
            )
        cores = len(os.sched_getaffinity(0))
        if workers * ranks < cores - ranks:
            more = max(workers + 1, cores // ranks - 1)
            advice = f"set encode.num_workers={more} (now {workers}; there are {cores} cores)"
        else:
            advice = (
                f"encode.num_workers is {workers} and this machine has {cores} cores, so store the "
                "pictures near the size that the model takes, on a fast local disk, or use more "
                "machines"
            )
        return (
            f"reading is the bottleneck: pictures were waited for in {share} of the time; {advice}"
        )
