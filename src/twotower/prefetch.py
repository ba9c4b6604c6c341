"""Batches through a device: a GPU reads, copies and computes at the same time."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

import torch
from torch import Tensor

T = TypeVar("T")

AHEAD = 2  # batches that a GPU has been given before the result of the first is asked for


class PrefetchToDevice:
    """Takes inputs to a device and results back, without letting a GPU wait in between.

    On CUDA inputs are copied on a stream of their own, beside the computation of the batches
    before, and a result is waited for only when later batches are on their way. What comes out is
    what a plain loop gives. On a CPU it is that loop.

    Attributes:
        device: where the tensors are computed with.
        ahead: batches that are begun before the result of the first is handed out.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._copies: torch.cuda.Stream | None = None
        if device.type == "cuda":
            self._copies = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self.ahead = 0 if self._copies is None else AHEAD

    def run(
        self, batches: Iterable[T], compute: Callable[[T], Tensor]
    ) -> Iterator[tuple[T, Tensor]]:
        """Each batch in order, with what `compute` makes of it, on the CPU.

        `compute` takes its inputs through `put` and does not wait for the device.
        """
        begun: deque[tuple[T, Callable[[], Tensor]]] = deque()
        for batch in batches:
            begun.append((batch, self._fetch(compute(batch))))
            if len(begun) > self.ahead:
                done, result = begun.popleft()
                yield done, result()
        for done, result in begun:
            yield done, result()

    def put(self, tensor: Tensor) -> Tensor:
        """A CPU tensor on the device; from pinned memory it is copied while the GPU computes."""
        if self._copies is None:
            return tensor.to(self.device)
        computing = torch.cuda.current_stream(self.device)
        with torch.cuda.stream(self._copies):
            moved = tensor.to(self.device, non_blocking=True)
        computing.wait_stream(self._copies)
        # It was allocated for the copying stream, which may have its memory back only when the
        # computing one is past its last use.
        moved.record_stream(computing)
        return moved

    def _fetch(self, tensor: Tensor) -> Callable[[], Tensor]:
        """Begin to copy a result to the CPU; the function waits for it, without spinning."""
        if self._copies is None:
            return lambda: tensor
        copied = tensor.to("cpu", non_blocking=True)  # into pinned memory
        there = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]
        there.record(torch.cuda.current_stream(self.device))

        def wait() -> Tensor:
            there.synchronize()
            return copied.clone()  # pinned memory is for what is on its way

        return wait
