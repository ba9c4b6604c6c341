"""What a run was made with, attempt by attempt: command, config, code, packages, machine."""

from __future__ import annotations

import dataclasses
import json
import os
import platform
import re
import shlex
import socket
import subprocess
import sys
from datetime import datetime
from importlib.metadata import distributions
from pathlib import Path
from typing import Any

from twotower import machine
from twotower.checkpoint.atomic import replacing
from twotower.config import Config
from twotower.distributed import world_size
from twotower.settings import Choice, Section, to_plain

PROVENANCE = "provenance.json"

# Of the environment only what changes how a run computes, by the start of its name.
RECORDED = re.compile(
    r"(CUDA|CUBLAS|NCCL|GLOO|OMP|MKL|KMP|OPENBLAS|MALLOC|TORCH|PYTORCH|TORCHELASTIC|SLURM|RAY"
    r"|HF_HUB)_|LD_PRELOAD|PYTHON(PATH|HASHSEED)|(LOCAL_|GROUP_)?RANK|(LOCAL_)?WORLD_SIZE|MASTER_"
)
SECRET = re.compile(r"TOKEN|SECRET|PASS|CREDENTIAL|KEY|JWT|AUTH", re.IGNORECASE)
# The password in `scheme://user:password@host`, and what follows `?token=` in an address.
PASSWORD = re.compile(r"(://[^/@:\s'\"]*:)[^/@\s'\"]+(?=@)")
QUERY = re.compile(
    r"(?i)([?&][^=&\s]*(?:token|secret|signature|credential|key|pass)[^=&\s]*=)[^&\s'\"]+"
)


def record_attempt(path: Path, config: Config, decision: str) -> None:
    """Write what this attempt at a run is made with, after those of the attempts it goes on from.

    Args:
        path: the file, a JSON list; `start` begins it anew.
        config: as asked for.
        decision: `start` or `resume`.

    Raises:
        ConfigError: the file cannot be written.
    """
    earlier = [] if decision == "start" else attempts(path)
    entry = {"decision": decision, **describe(config)}
    with replacing(path) as partial:
        partial.write_text(json.dumps([*earlier, entry], indent=1) + "\n")


def attempts(path: Path) -> list[dict[str, Any]]:
    """The attempts recorded so far, oldest first; none if the file is missing or damaged."""
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError):
        return []
    return found if isinstance(found, list) else []


def describe(config: Config) -> dict[str, Any]:
    """This process and what it was asked for, as JSON, without secrets."""
    return {
        "time": datetime.now().astimezone().isoformat(timespec="seconds"),
        "command": masked(shlex.join(sys.argv)),
        "folder": os.getcwd(),
        "git": {
            "folder": revision(Path.cwd()),
            "twotower": revision(Path(__file__).parent, Path(__file__).name),
        },
        "machine": {
            "host": socket.gethostname(),
            "platform": platform.platform(),
            "python": platform.python_version(),
            "cpu": machine.processor(),
            "cores": machine.cores(),
            "memory": machine.memory(),
            "gpus": machine.gpus(),
            "torch": machine.torch_build(),
            "ranks": world_size(),
        },
        "environment": environment(),
        "config": plain(config),
        "packages": packages(),
    }


def revision(folder: Path, file: str = "") -> dict[str, Any] | None:
    """The git work tree that holds `folder`: its root, commit, and whether tracked files changed.

    None where there is no git, no work tree or no commit, or where `file` is not tracked.
    """
    try:
        if file:
            _git(folder, "ls-files", "--error-unmatch", file)
        root, commit = _git(folder, "rev-parse", "--show-toplevel", "HEAD").splitlines()
        changed = _git(folder, "status", "--porcelain", "--untracked-files=no")
    except (OSError, ValueError, subprocess.SubprocessError):
        return None
    return {"root": root, "revision": commit, "dirty": bool(changed)}


def _git(folder: Path, *arguments: str) -> str:
    # Without optional locks, so that `status` writes nothing into somebody's repository.
    command = ["git", "--no-optional-locks", "-C", str(folder), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=20)
    return done.stdout


def environment() -> dict[str, str]:
    """The environment variables that change how a run computes; none that may hold a secret."""
    return {
        name: masked(value)
        for name, value in sorted(os.environ.items())
        if RECORDED.match(name) and not SECRET.search(name)
    }


def packages() -> dict[str, str]:
    """Version of every installed distribution, by its name in lower case."""
    return dict(sorted((str(d.name).lower(), d.version) for d in distributions()))


def plain(config: Config) -> dict[str, Any]:
    """A config as JSON, passwords in addresses masked; a section says which choice it is."""
    found: dict[str, Any] = {}
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if isinstance(value, Choice):
            found[field.name] = {"registered_name": value.registered_name, **to_plain(value)}
        else:
            found[field.name] = to_plain(value) if isinstance(value, Section) else value
    masked_config: dict[str, Any] = json.loads(masked(json.dumps(found)))
    return masked_config


def masked(text: str) -> str:
    """`text` without the passwords, tokens and signatures of the addresses in it."""
    return QUERY.sub(r"\1***", PASSWORD.sub(r"\1***", text))
