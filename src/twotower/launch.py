"""Starting the processes of a command, and what their ends mean."""

from __future__ import annotations

import gc
import json
import logging
import os
import tempfile
import time
import traceback
import uuid
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from twotower.allocator import keep_freed_memory
from twotower.config import Device, DistributedConfig
from twotower.distributed import Stopped, local_world_size, rank, resolve_device, under_torchrun
from twotower.settings import ConfigError, Diverged

T = TypeVar("T")

SECONDS_TO_SAVE = 600

_REFUSALS = {refusal.__name__: refusal for refusal in (ConfigError, Diverged)}


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
    share = max(1, len(os.sched_getaffinity(0)) // local_world_size())
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
            check_processes(config, local_world_size())
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
