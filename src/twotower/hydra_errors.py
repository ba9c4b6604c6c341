"""What goes wrong in Hydra, in OmegaConf or at a path, told to the user in one sentence."""

from __future__ import annotations

import dataclasses
import errno
import itertools
import re
from difflib import get_close_matches

from hydra.errors import OverrideParseException
from omegaconf.errors import OmegaConfBaseException

from twotower.settings import ConfigError

# Options of Hydra's plugins, by the extra that installs them.
EXTRAS = {
    "hydra/sweeper/optuna": "optuna",
    "hydra/launcher/ray": "ray",
    "hydra/launcher/submitit_local": "slurm",
    "hydra/launcher/submitit_slurm": "slurm",
}
AVAILABLE = "Available options in"


def no_such_key(key: str, known: list[str]) -> ConfigError:
    """The refusal of an unknown key, with the one that was probably meant."""
    prefix, dot, last = key.rpartition(".")
    near = get_close_matches(last, [name.rpartition(".")[2] for name in known], n=1)
    hint = f"; did you mean {prefix}{dot}{near[0]}?" if near else ""
    return ConfigError(f"no such config key: {key}{hint}")


def sentence(error: BaseException) -> str:
    """One line out of Hydra's and OmegaConf's many."""
    if isinstance(error, OverrideParseException):
        return (
            f"cannot read {error.override!r}: an override is key=value, and a value with blanks, "
            "commas or brackets in it stands in quotes, as in 'key=\"a value\"'"
        )
    cause = error.__cause__ if isinstance(error.__cause__, OmegaConfBaseException) else error
    if isinstance(cause, OmegaConfBaseException):
        key = cause.full_key or ""
        not_there = re.match(r"Key '(.+?)' (?:not in|is not in struct)", str(cause))
        if not_there:
            node = cause.object_type
            known = (
                [f.name for f in dataclasses.fields(node)] if dataclasses.is_dataclass(node) else []
            )
            prefix = key.rpartition(".")[0]
            names = [f"{prefix}.{name}" if prefix else name for name in known]
            return str(no_such_key(key, names))
        first = str(cause).strip().splitlines()[0]
        if first.startswith("Missing mandatory value"):
            return f"{key} has no value; give it as {key}=..."
        return f"{key}: {_lower(first)}" if key else first
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if any(line.startswith(AVAILABLE) for line in lines):
        return _no_such_option(lines)
    return " ".join(line for line in lines if not line.startswith("See https://"))


def _no_such_option(lines: list[str]) -> str:
    """Hydra's paragraphs about an unknown option of a config group, as one sentence."""
    what = re.sub(r"^In '.*?': ", "", lines[0])
    asked = re.search(r"'(.+?)'", what)
    if asked and asked[1] in EXTRAS:
        option = asked[1].rpartition("/")
        extra = EXTRAS[asked[1]]
        return f"{option[0]}={option[2]} needs a plugin: pip install 'twotower[{extra}]'"
    (first, *_) = (i for i, line in enumerate(lines) if line.startswith(AVAILABLE))
    options = itertools.takewhile(lambda line: line != "Config search path:", lines[first + 1 :])
    return f"{_lower(what)}; {_lower(lines[first])} {', '.join(options)}"


def _lower(text: str) -> str:
    return text[:1].lower() + text[1:]


def refusal(error: BaseException) -> ConfigError | None:
    """The user's mistake behind an error: one in the config, or a place that cannot be used."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, ConfigError):
            return cause
        if isinstance(cause, OSError) and cause.filename is not None:
            return ConfigError(f"cannot write or read {cause.filename}: {cause.strerror or cause}")
        if isinstance(cause, OSError) and cause.errno in (errno.ENOSPC, errno.EDQUOT, errno.EROFS):
            return ConfigError(f"cannot write: {cause.strerror}")
        # OmegaConf does not name the cause of what a resolver raised.
        hidden = cause.__context__ if isinstance(cause, OmegaConfBaseException) else None
        cause = cause.__cause__ or hidden
    return None
