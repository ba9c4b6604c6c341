"""What is about ranks: which one this is, what they exchange, and on which device."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from twotower.config import Device, DistributedConfig
from twotower.settings import ConfigError

T = TypeVar("T")


class Stopped(Exception):
    """The user's Ctrl-C or SIGTERM, after everything was saved; the exit code is 128 + `signal`."""

    def __init__(self, signal: int, saved: str) -> None:
        super().__init__(signal, saved)
        self.signal, self.saved = signal, saved


def under_torchrun() -> bool:
    """Whether torchrun (or `launch`) started this process."""
    return "TORCHELASTIC_RUN_ID" in os.environ


def rank() -> int:
    """This process's number, 0 where there is only one."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """How many processes work together, 1 where there is only one."""
    return dist.get_world_size() if dist.is_initialized() else 1


def local_world_size() -> int:
    """How many of them share this machine's cores."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", world_size()))


def is_launched_main() -> bool:
    """Whether this process speaks for all of a torchrun, before and after they meet in a group."""
    return not under_torchrun() or os.environ.get("RANK", "0") == "0"


def is_main_process() -> bool:
    """Whether this process writes; collectives must never depend on it."""
    return rank() == 0


def shard_range(total: int, index: int, count: int) -> range:
    """The contiguous part `index` of `count` parts of `range(total)`, equal in size up to one."""
    return range(total * index // count, total * (index + 1) // count)


def barrier() -> None:
    """Wait for every rank."""
    if dist.is_initialized():
        dist.barrier()


def average_over_ranks(tensors: Sequence[Tensor]) -> None:
    """Put the mean over ranks into each tensor, in one message; every rank calls it."""
    if world_size() == 1 or not tensors:
        return
    flat = torch.cat([tensor.reshape(-1) for tensor in tensors])
    dist.all_reduce(flat)
    parts = torch.split(flat / world_size(), [tensor.numel() for tensor in tensors])
    for tensor, part in zip(tensors, parts, strict=True):
        tensor.copy_(part.view_as(tensor))


def all_gather_objects(item: T) -> list[T]:
    """Each rank's `item`, in rank order, on every rank; small picklable things only."""
    if not dist.is_initialized():
        return [item]
    items: list[Any] = [None] * world_size()
    dist.all_gather_object(items, item)
    return items


def broadcast_object(item: T) -> T:
    """The first rank's `item`, on every rank."""
    if not dist.is_initialized():
        return item
    items: list[Any] = [item]
    dist.broadcast_object_list(items, src=0)
    return items[0]  # type: ignore[no-any-return]


def on_main(fn: Callable[..., T], *args: Any) -> T:
    """Run `fn(*args)` on the first rank; every rank gets its result, or raises its `ConfigError`.

    So a refusal ends all ranks with the same sentence instead of leaving them in a collective.
    """
    outcome: tuple[bool, Any] = (True, None)
    if is_main_process():
        try:
            outcome = (True, fn(*args))
        except ConfigError as error:
            outcome = (False, str(error))
    agreed, value = broadcast_object(outcome)
    if not agreed:
        raise ConfigError(value)
    return value  # type: ignore[no-any-return]


class _AllGather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, features: Tensor) -> Tensor:
        parts = [torch.empty_like(features) for _ in range(world_size())]
        dist.all_gather(parts, features.contiguous())
        return torch.cat(parts)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        # Every rank's loss depends on every rank's features, so the gradients add up over the
        # ranks.
        total = grad.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total)
        return total.chunk(world_size())[rank()]


def all_gather_with_grad(features: Tensor) -> Tensor:
    """(B, D) on each rank -> (world_size * B, D) in rank order, differentiable.

    The backward pass sums over ranks what each rank's loss asks of these features. With each
    rank's loss a mean over its own rows and DDP's average over ranks, towers and `logit_scale` get
    exactly the gradient of the one-process full batch; a gather without gradient gives the towers
    1 / world_size of it.
    """
    if world_size() == 1:
        return features
    gathered: Tensor = _AllGather.apply(features)
    return gathered


@contextmanager
def num_threads(count: int) -> Iterator[None]:
    """Let torch use so many CPU threads for a while."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def resolve_device(config: DistributedConfig) -> torch.device:
    """The device of this rank.

    Raises:
        ConfigError: CUDA is asked for and absent.
    """
    available = torch.cuda.is_available()
    if config.device is Device.cuda and not available:
        raise ConfigError(
            "distributed.device is cuda, but torch sees no GPU; use distributed.device=cpu"
        )
    if config.device is Device.cpu or not available:
        return torch.device("cpu")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)) % torch.cuda.device_count())
