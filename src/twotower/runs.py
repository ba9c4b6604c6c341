"""Where everything of a run is: one name, two folders."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from twotower.config import Config
from twotower.wandb_files import CHECKPOINTS, local_file, parse_reference

NOTE = "run.json"  # in a run's folder of models: what decided its result


@dataclass(frozen=True)
class RunPaths:
    """`models/<name>` holds checkpoints, store and index; `logs/<name>` logs and figures."""

    models: Path
    logs: Path

    @classmethod
    def of(cls, config: Config) -> RunPaths:
        """The folders of the run that a config names."""
        name = config.run.name
        return cls(Path(config.run.models_dir) / name, Path(config.run.logs_dir) / name)

    @property
    def best(self) -> Path:
        """The checkpoint with the best validation recall so far."""
        return self.models / "best.safetensors"

    @property
    def last(self) -> Path:
        """The newest checkpoint."""
        return self.models / "last.safetensors"

    @property
    def first(self) -> Path:
        """The weights before the first step, kept where WiSE-FT is asked for."""
        return self.models / "first.safetensors"

    @property
    def wise_ft(self) -> Path:
        """The chosen one of the weights between the first and the last."""
        return self.models / "wise_ft.safetensors"

    @property
    def store(self) -> Path:
        """The embedding store made from this run's checkpoint."""
        return self.models / "store"


def checkpoint_path(config: Config) -> Path:
    """The checkpoint that a command works with: `checkpoint=`, or the best one of the run.

    One at Weights & Biases (`wandb:...`) is downloaded.

    Raises:
        ConfigError: it cannot be downloaded.
    """
    if not config.checkpoint:
        return RunPaths.of(config).best
    return local_file(config.checkpoint, CHECKPOINTS)


def store_path(config: Config) -> Path:
    """The store that a command works with: `store=`, or that beside the checkpoint.

    That of a checkpoint at Weights & Biases is in the run folder of the artifact's name.
    """
    if config.store:
        return Path(config.store)
    if parse_reference(config.checkpoint) is not None:
        return Path(config.run.models_dir) / run_of(config.checkpoint, "") / "store"
    return checkpoint_path(config).parent / "store"


def logs_path(config: Config) -> Path:
    """`logs/<run>` of the run whose checkpoint or store a command works with."""
    given = config.checkpoint or config.store
    return Path(config.run.logs_dir) / run_of(given, config.run.name)


def run_of(given: str, name: str) -> str:
    """The name of the run that a given checkpoint or store lies in; `name` if none is given."""
    reference = parse_reference(given)
    if reference is not None:
        return reference.name
    return (Path(given).absolute().parent.name if given else "") or name
