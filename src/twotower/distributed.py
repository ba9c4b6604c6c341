"""The one file about ranks: starting them, which one this is, and what they exchange."""

from __future__ import annotations

import gc
import json
import logging
import os
import tempfile
import time
import traceback
import uuid
from collections.abc import Callable, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from twotower.allocator import keep_freed_memory
from twotower.config import Device, DistributedConfig
from twotower.settings import ConfigError, Diverged

log = logging.getLogger(__name__)

T = TypeVar("T")

SECONDS_TO_SAVE = 600

_REFUSALS = {refusal.__name__: refusal for refusal in (ConfigError, Diverged)}


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


def check_processes(config: DistributedConfig, wanted: int) -> None:
    """Refuse more processes than the machine can run.

    Raises:
        ConfigError: more processes than GPUs, or than cores where the work runs on CPUs.
    """
    on_gpus = config.device is not Device.cpu and torch.cuda.is_available()
    count = torch.cuda.device_count() if on_gpus else len(os.sched_getaffinity(0))
    if wanted > count and not config.oversubscribe:
        what = "GPU" if on_gpus else "CPU core"
        raise ConfigError(
            f"distributed.nproc_per_node is {wanted}, but this machine has {count} {what}"
            f"{'' if count == 1 else 's'}; lower it, or set distributed.oversubscribe=true"
        )


def _prepare_process(config: DistributedConfig) -> None:
    if resolve_device(config).type == "cpu":
        keep_freed_memory()
    local_world = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    share = max(1, len(os.sched_getaffinity(0)) // local_world)
    torch.set_num_threads(config.num_threads or share)


def _rank_main(
    fn: Callable[..., T], config: DistributedConfig, log_file: str, notes: str, args: Any
) -> T:
    """One rank's life: process group, threads, log, the work, and a clean end."""
    from twotower.console import ConsoleHandler

    _prepare_process(config)
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
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
        result = fn(*args)
    except Exception as error:
        if notes:
            _leave_note(Path(notes), error)
            if isinstance(error, Stopped):
                # The launcher that told this rank to stop waits for its end, not its result.
                raise SystemExit(128 + error.signal) from None
        # The group is left to the end of the process: its end brings the other ranks down.
        raise
    gc.collect()  # what still holds the group (a wrapped model) must go before it
    dist.destroy_process_group()
    return result


def _leave_note(folder: Path, error: Exception) -> None:
    """Write down why this rank ends, before its end makes the others fail as well."""
    kind, text = type(error).__name__, str(error)
    if isinstance(error, Stopped):
        text = error.saved
    elif not isinstance(error, ConfigError):
        text = "".join(traceback.format_exception(error))
    note = {"rank": rank(), "kind": kind, "text": text, "signal": getattr(error, "signal", 0)}
    (folder / f"{time.time_ns()}-{rank()}.json").write_text(json.dumps(note))


def _first_note(folder: Path) -> Exception | None:
    """The reason of the rank that ended first."""
    for path in sorted(folder.glob("*.json")):
        note = json.loads(path.read_text())
        if note["kind"] in _REFUSALS:
            return _REFUSALS[note["kind"]](note["text"])
        if note["kind"] == Stopped.__name__:
            return Stopped(note["signal"], note["text"])
        return RuntimeError(f"rank {note['rank']} failed:\n{note['text']}")
    return None


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
        if config.device is not Device.cpu and torch.cuda.is_available():
            check_processes(config, int(os.environ["LOCAL_WORLD_SIZE"]))
        return _rank_main(fn, config, "", "", args)
    check_processes(config, config.nproc_per_node)
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
        **_patience(LaunchConfig),
    )
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    with tempfile.TemporaryDirectory() as notes:
        try:
            start = elastic_launch(launch_config, _rank_main)
            results = start(fn, config, _log_file(), notes, args)
        except ChildFailedError as error:
            number, failure = error.get_first_failure()
            unknown = RuntimeError(f"rank {number} died with exit code {failure.exitcode}")
            raise _first_note(Path(notes)) or unknown from None
        except SignalException as error:
            untold = Stopped(error.sigval, "the ranks had the time to save")
            raise _first_note(Path(notes)) or untold from None
    return results[0]  # type: ignore[no-any-return]


def _patience(launch_config: Any) -> dict[str, Any]:
    """The time that ranks have to save after Ctrl-C, where torch lets it be said (else 30 s)."""
    known = "shutdown_timeout" in launch_config.__dataclass_fields__
    return {"shutdown_timeout": SECONDS_TO_SAVE} if known else {}
