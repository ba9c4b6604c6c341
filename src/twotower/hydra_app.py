"""The only door out of Hydra: composes the config, checks it, and hands typed values to a command.

Hydra's grammar and messages stay behind this module: a mistake becomes a `ConfigError` of one
sentence.
"""

from __future__ import annotations

import copy
import dataclasses
import hashlib
import json
import logging
import math
import os
import shutil
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import hydra
from hydra.core.config_store import ConfigStore
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf, open_dict, read_write
from omegaconf.errors import OmegaConfBaseException

from twotower.config import Config, FreeText, check_run_name
from twotower.data import DATASETS
from twotower.distributed import Stopped
from twotower.hydra_errors import no_such_key, refusal, sentence
from twotower.models import MODELS
from twotower.retrieval import INDEXES
from twotower.runs import run_of
from twotower.settings import ConfigError, Diverged
from twotower.train_config import TrainConfig
from twotower.training.loss import LOSSES

log = logging.getLogger(__name__)

# What a command returns reaches the sweeper; Optuna takes the number that `train` returns.
Command = Callable[[Config, FreeText], float | None]

MULTIRUN = ("-m", "--multirun")

# Commands that belong to no run keep no folder and no log; others log beside the run they work on.
WITHOUT_RUN = ("prepare", "doctor", "store", "compare", "export", "info")


def run_name(root: DictConfig) -> str:
    """`<model>-<data>-<hash>`: 8 hex digits of SHA-256 over what decides a run's result."""
    parts: dict[str, Any] = {"seed": root.seed}
    for key in ("model", "data", "loss", "train"):
        parts[key] = OmegaConf.to_container(root[key], resolve=True, enum_to_str=True)
    for key in TrainConfig.not_in_run_name:
        parts["train"].pop(key, None)
    text = json.dumps(parts, sort_keys=True, default=str)
    names = [
        getattr(OmegaConf.get_type(root, key), "registered_name", "") for key in ("model", "data")
    ]
    return "-".join([*names, hashlib.sha256(text.encode()).hexdigest()[:8]])


def log_dir(root: DictConfig, command: str) -> str:
    """`<run>/<command>`: where a command logs, by the run whose checkpoint or store it is given.

    Raises:
        ConfigError: the name of the run is no name of a folder.
    """
    check_run_name(root.run.name)
    given = "" if command == "train" else root.checkpoint or root.store
    return f"{run_of(given, root.run.name)}/{command}"


def _checked(root: DictConfig) -> DictConfig:
    """What is refused makes no folder; but a job of a sweep tells in its own log why it was.

    Raises:
        ConfigError: as `to_config`.
    """
    if root.hydra.mode != RunMode.MULTIRUN:
        composed = copy.deepcopy(root)
        with read_write(composed), open_dict(composed):
            del composed["hydra"]
        to_config(composed)
    return root


def register_schemas(command: str) -> None:
    """Give Hydra the schemas of `Config` and of every choice, and the resolvers in the YAML."""
    store = ConfigStore.instance()
    store.store(name="base_config", node=Config, provider="twotower")
    for registry in (MODELS, DATASETS, INDEXES, LOSSES):
        for name in registry:
            store.store(
                group=f"schema/{registry.group}",
                name=name,
                node=registry.config_class(name),
                provider="twotower",
            )
    OmegaConf.register_new_resolver(
        "twotower.run_name", lambda *, _root_: run_name(_root_), replace=True, use_cache=False
    )
    OmegaConf.register_new_resolver("twotower.command", lambda: command, replace=True)
    OmegaConf.register_new_resolver(
        "twotower.log_dir",
        lambda *, _root_: log_dir(_checked(_root_), command),
        replace=True,
        use_cache=False,
    )


def _unknown_keys(node: DictConfig, prefix: str = "") -> Iterator[tuple[str, list[str]]]:
    """Keys that `+key=` put in past the schema, with the keys that would have been right."""
    node_type = OmegaConf.get_type(node)
    known = (
        [field.name for field in dataclasses.fields(node_type)]
        if dataclasses.is_dataclass(node_type)
        else []
    )
    for key in map(str, node):
        if key not in known:
            yield f"{prefix}{key}", [f"{prefix}{name}" for name in known]
        elif not OmegaConf.is_missing(node, key) and isinstance(node[key], DictConfig):
            yield from _unknown_keys(node[key], f"{prefix}{key}.")


def to_config(composed: DictConfig) -> Config:
    """Turn what Hydra composed into a checked `Config`.

    Raises:
        ConfigError: an unknown key, a missing or wrong value, or one out of its range.
    """
    for key, known in _unknown_keys(composed):
        raise no_such_key(key, known)
    try:
        config = OmegaConf.to_object(composed)
    except OmegaConfBaseException as error:
        raise ConfigError(sentence(error)) from error
    assert isinstance(config, Config)
    return config


def compose(overrides: list[str], command: str = "train") -> Config:
    """Compose and check a config without running a command (tests, notebooks).

    Raises:
        ConfigError: as `to_config`.
    """
    register_schemas(command)
    try:
        with hydra.initialize_config_module("twotower.conf", version_base="1.3"):
            return to_config(hydra.compose("config", overrides))
    except (HydraException, OmegaConfBaseException) as error:
        raise ConfigError(sentence(error)) from error


def _refuse_sweep_under_torchrun(overrides: list[str]) -> None:
    wanted = any(o in MULTIRUN or o.startswith("sweep=") for o in overrides)
    if "TORCHELASTIC_RUN_ID" in os.environ and wanted:
        raise ConfigError(
            "a sweep cannot run under torchrun; run `twotower train -m ... "
            "distributed.nproc_per_node=N`, which starts the ranks of each job itself"
        )


def _without_traces(name: str) -> list[str]:
    """Overrides that leave no folder and no log: for other ranks and commands without a run."""
    if os.environ.get("RANK", "0") != "0":
        logging_off = ["hydra/job_logging=disabled", "hydra/hydra_logging=disabled"]
        return [*logging_off, "hydra.output_subdir=null"]
    if name in WITHOUT_RUN:
        nowhere = ["hydra.output_subdir=null", "hydra.run.dir=.", "hydra.sweep.subdir=."]
        return ["hydra/job_logging=console", *nowhere]
    return []


def _forget_refused(folder: Path, name: str) -> None:
    """Remove a job's folder if nothing was logged in it: it holds only what Hydra puts there."""
    entries = {entry.name: entry for entry in folder.iterdir()}
    log_file = entries.pop(f"{name}.log", None)
    entries.pop(".hydra", None)
    if log_file is not None and not log_file.stat().st_size and not entries:
        shutil.rmtree(folder, ignore_errors=True)
        with suppress(OSError):  # other commands of the run have folders beside it
            folder.parent.rmdir()


def _run_job(
    name: str, command: Command, composed: DictConfig, free_text: FreeText
) -> float | None:
    """One job, alone or of a sweep, where a mistake must not keep the other jobs from running."""
    job = HydraConfig.get()
    alone = job.mode != RunMode.MULTIRUN
    # What the job's ranks inherit, and what it records as its command.
    sys.argv = ["twotower", name, *job.overrides.task]
    try:
        return command(to_config(composed), free_text)
    except Stopped as stopped:
        _fail(f"stopped: {stopped.saved}")
        sys.exit(128 + stopped.signal)
    except Exception as error:
        mistake = refusal(error)
        if mistake is not None and alone:
            _forget_refused(Path(job.runtime.output_dir), name)
            sys.exit(_fail(str(mistake)))
        if mistake is not None:
            log.error("twotower: %s", mistake)
            if isinstance(mistake, Diverged) and job.runtime.choices["hydra/sweeper"] == "optuna":
                return -math.inf  # the trial has failed, the study goes on
            raise mistake from error
        log.exception("the command failed")
        if alone:
            sys.exit(1)
        raise


def run_command(name: str, command: Command, free: dict[str, str], overrides: list[str]) -> int:
    """Run `command` once, or once a job with `-m`; the exit code.

    Only the first rank under torchrun keeps Hydra's folder and log.
    """
    register_schemas(name)
    free_text = FreeText(**free)
    # Hydra's parser takes -m before or after all overrides, not among them.
    overrides = sorted(overrides, key=lambda override: override not in MULTIRUN)
    overrides += _without_traces(name)
    if {"-h", "--help"} & set(overrides):
        from twotower.config_help import command_help

        sys.stdout.write(command_help(name) + "\n")
        return 0

    @hydra.main(version_base="1.3", config_path="pkg://twotower.conf", config_name="config")
    def job(composed: DictConfig) -> float | None:
        return _run_job(name, command, composed, free_text)

    os.environ["HYDRA_FULL_ERROR"] = "1"
    sys.argv = [f"twotower {name}", *overrides]
    try:
        _refuse_sweep_under_torchrun(overrides)
        job()
    except KeyboardInterrupt:
        sys.stderr.write("\ntwotower: stopped\n")
        return 130
    except Exception as error:
        if (mistake := refusal(error)) is not None:
            return _fail(str(mistake))
        if isinstance(error, HydraException | OmegaConfBaseException):
            return _fail(sentence(error))
        traceback.print_exc()
        return 1
    return 0


def _fail(text: str) -> int:
    sys.stderr.write(f"twotower: {text}\n")
    return 1
