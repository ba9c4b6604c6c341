"""Files at Weights & Biases: `wandb:<entity>/<project>/<name>:<version>` in place of a path."""

from __future__ import annotations

import fcntl
import importlib
import logging
import os
import re
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from twotower.settings import ConfigError

log = logging.getLogger(__name__)

PREFIX = "wandb:"
FORM = "wandb:<entity>/<project>/<name>:<version or alias>, and /<file> for one of several files"
CHECKPOINTS = (".safetensors", ".pt")


@dataclass(frozen=True)
class Reference:
    """An artifact at W&B, and a file in it; an empty `file` is the only one that fits."""

    entity: str
    project: str
    name: str
    alias: str
    file: str

    @property
    def artifact(self) -> str:
        """As W&B writes it."""
        return f"{self.entity}/{self.project}/{self.name}:{self.alias}"


def parse_reference(given: str) -> Reference | None:
    """What a setting refers to; None for an ordinary path.

    Raises:
        ConfigError: it begins with `wandb:` and is malformed.
    """
    if not given.startswith(PREFIX):
        return None
    part = r"([^/:\s]+)"
    found = re.fullmatch(rf"{PREFIX}{part}/{part}/{part}:{part}(?:/(.+))?", given)
    if found is None or ".." in found.groups(""):
        raise ConfigError(f"{given} is no artifact; write it as {FORM}")
    return Reference(*found.groups(""))


def import_wandb(setting: str) -> Any:
    """The package wandb.

    Raises:
        ConfigError: it is not installed; the sentence names the `setting` that asks for it.
    """
    try:
        return importlib.import_module("wandb")
    except ImportError as error:
        raise ConfigError(
            f"{setting} needs the package wandb, which is not installed; "
            "install it with: pip install 'twotower[wandb]'"
        ) from error


def local_file(given: str, endings: Sequence[str]) -> Path:
    """The path that a setting names; what lies at W&B is downloaded once and kept.

    Every process may call it: on one machine the first downloads, and the others wait.

    Raises:
        ConfigError: the reference is malformed, W&B does not give the artifact, or not one of its
            files has one of the `endings`.
    """
    reference = parse_reference(given)
    if reference is None:
        return Path(given)
    folder = _kept(reference)
    if reference.file:
        path = folder / reference.file
        if not path.is_file() or not path.resolve().is_relative_to(folder.resolve()):
            raise ConfigError(f"the artifact {reference.artifact} has no file {reference.file}")
        return path
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    fitting = [path for path in files if path.name.endswith(tuple(endings))]
    if len(fitting) != 1:
        names = ", ".join(str(path.relative_to(folder)) for path in (fitting or files)[:5])
        raise ConfigError(
            f"the artifact {reference.artifact} holds {len(fitting)} files that end in "
            f"{' or '.join(endings)} ({names}); name one: {FORM}"
        )
    return fitting[0]


@lru_cache(maxsize=64)
def _kept(reference: Reference) -> Path:
    """The folder of a downloaded artifact; a version that is there is not asked for again."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    home = cache / "twotower" / "wandb" / reference.entity / reference.project / reference.name
    if re.fullmatch(r"v\d+", reference.alias) and (home / reference.alias).is_dir():
        return home / reference.alias
    with _sentences(reference):
        artifact = find_artifact(reference.artifact)
        folder = home / str(artifact.version)
        with _alone(home):
            if not folder.is_dir():
                log.info("downloading %s to %s", reference.artifact, folder)
                partial = home / f".{folder.name}"
                shutil.rmtree(partial, ignore_errors=True)
                artifact.download(root=str(partial))
                partial.rename(folder)
    return folder


@contextmanager
def _sentences(reference: Reference) -> Iterator[None]:
    """Whatever goes wrong between here and W&B, as a sentence."""
    try:
        yield
    except ConfigError:
        raise
    except Exception as error:  # wandb's own, and those of what it is built on
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ConfigError(
            f"cannot get {reference.artifact} from Weights & Biases ({reason}); "
            "check the name, the network and `wandb login`"
        ) from error


def find_artifact(name: str) -> Any:
    """The artifact of a name, asked for at W&B: all that needs the network is behind this.

    It has `version` and `download(root=...)`.
    """
    return import_wandb(f"{PREFIX}{name}").Api().artifact(name)


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Wait until no other process of this machine works in a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
