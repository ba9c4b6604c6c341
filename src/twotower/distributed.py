"""The one file about ranks: starting them, which one this is, and what they exchange."""

from __future__ import annotations

import ctypes
import json
import logging
import multiprocessing
import os
import signal
import uuid
from collections.abc import Callable
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from twotower.config import ConfigError, Device, DistributedConfig

log = logging.getLogger(__name__)

T = TypeVar("T")

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # <malloc.h>

_REFUSED = "twotower-config-error: "


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
        total = grad.contiguous()
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


def check_processes(config: DistributedConfig) -> None:
    """Refuse more processes than the machine can run.

    Raises:
        ConfigError: more processes than GPUs, or than cores where the work runs on CPUs.
    """
    wanted = config.nproc_per_node
    on_gpus = config.device is not Device.cpu and torch.cuda.is_available()
    count = torch.cuda.device_count() if on_gpus else len(os.sched_getaffinity(0))
    if wanted > count and not config.oversubscribe:
        what = "GPU" if on_gpus else "CPU core"
        raise ConfigError(
            f"distributed.nproc_per_node is {wanted}, but this machine has {count} {what}"
            f"{'' if count == 1 else 's'}; lower it, or set distributed.oversubscribe=true"
        )


def _keep_freed_memory() -> None:
    """Let the C library keep large blocks that are freed, for the next layer of the same size.

    By default glibc gives each activation's pages back and faults them in anew, which takes half
    of the time of a convolutional tower on CPUs. Other C libraries are left as they are.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_MMAP_THRESHOLD, 1 << 30)
        mallopt(_M_TRIM_THRESHOLD, (1 << 31) - 1)


def _prepare_process(config: DistributedConfig) -> None:
    if resolve_device(config).type == "cpu":
        _keep_freed_memory()
    local_world = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    share = max(1, len(os.sched_getaffinity(0)) // local_world)
    torch.set_num_threads(config.num_threads or share)


def _rank_main(
    fn: Callable[..., T], config: DistributedConfig, log_file: str, args: tuple[Any, ...]
) -> T | Stopped:
    """One rank's life: process group, threads, log, the work, and a clean end."""
    from twotower.console import ConsoleHandler

    _prepare_process(config)
    device = resolve_device(config)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    first = os.environ["RANK"] == "0"
    if log_file:
        root = logging.getLogger()
        root.setLevel(logging.INFO if first else logging.WARNING)
        console = ConsoleHandler()
        file = logging.FileHandler(log_file)
        console.setFormatter(logging.Formatter("%(message)s"))
        prefix = "" if first else f"[rank {os.environ['RANK']}] "
        file.setFormatter(
            logging.Formatter(f"%(asctime)s %(levelname)s %(name)s: {prefix}%(message)s")
        )
        root.handlers = [console, file]
    dist.init_process_group(
        "nccl" if device.type == "cuda" else "gloo",
        timeout=timedelta(minutes=config.timeout_minutes),
    )
    try:
        return fn(*args)
    except Stopped as stopped:
        if multiprocessing.parent_process() is not None:
            # The launcher that told this rank to stop waits for its end, not for its result.
            raise SystemExit(128 + stopped.signal) from None
        return stopped
    except ConfigError as error:
        raise RuntimeError(f"{_REFUSED}{error}") from error
    finally:
        dist.destroy_process_group()


def _log_file() -> str:
    for handler in logging.getLogger().handlers:
        if isinstance(handler, logging.FileHandler):
            return handler.baseFilename
    return ""


def launch(fn: Callable[..., T], config: DistributedConfig, *args: Any) -> T:
    """Run `fn(*args)` on every rank and return the first rank's result.

    Under torchrun, or with one process wanted, it is called here (breakpoints work); else torch's
    elastic launcher starts the ranks, and `fn` must live in a library module. A rank that fails
    ends all of them.

    Raises:
        ConfigError: too many processes, or a `ConfigError` in a rank.
        Stopped: the ranks were asked to stop and have saved what they had.
        RuntimeError: a rank failed; the message holds its traceback.
    """
    if under_torchrun():
        try:
            return _unless_stopped(_rank_main(fn, config, "", args))  # type: ignore[no-any-return]
        except RuntimeError as error:
            if isinstance(error.__cause__, ConfigError):
                raise error.__cause__ from None
            raise
    check_processes(config)
    if config.nproc_per_node == 1:
        _prepare_process(config)
        return fn(*args)
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    launch_config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=config.nproc_per_node,
        run_id=uuid.uuid4().hex,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        max_restarts=0,
        monitor_interval=0.1,
        start_method="spawn",
    )
    try:
        results = elastic_launch(launch_config, _rank_main)(fn, config, _log_file(), args)
    except ChildFailedError as error:
        raise _first_failure(error) from None
    except SignalException as error:
        raise Stopped(error.sigval, "the ranks were told to save and stop") from None
    return _unless_stopped(results[0])  # type: ignore[no-any-return]


def _unless_stopped(result: Any) -> Any:
    if isinstance(result, Stopped):
        raise result
    return result


def _first_failure(error: Any) -> Exception:
    """The error of the rank that failed first, with its own traceback or sentence."""
    failed_rank, failure = error.get_first_failure()
    if failure.exitcode - 128 in (signal.SIGINT, signal.SIGTERM):
        return Stopped(failure.exitcode - 128, f"rank {failed_rank} was told to save and stop")
    text = str(failure.message)
    try:
        with open(failure.error_file) as file:
            message = json.load(file)["message"]
        text = message["extraInfo"]["py_callstack"] if isinstance(message, dict) else str(message)
    except (OSError, ValueError, KeyError):
        pass
    if _REFUSED in text:
        return ConfigError(text.rsplit(_REFUSED, 1)[1].split("\n")[0].strip())
    return RuntimeError(f"rank {failed_rank} failed (exit code {failure.exitcode}):\n{text}")
