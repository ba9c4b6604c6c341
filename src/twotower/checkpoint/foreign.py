"""The JSON beside other people's weights, read so that a mistake in it becomes a sentence."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from twotower.settings import ConfigError


def read_json(path: Path) -> dict[str, Any]:
    """The object that a JSON file holds.

    Raises:
        ConfigError: missing, not JSON, or not an object.
    """
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"{path} is missing") from None
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path} cannot be read as JSON: {error}") from error
    if not isinstance(values, dict):
        raise ConfigError(f"{path} does not hold a JSON object")
    return values


def three(path: Path, values: Any) -> tuple[float, float, float]:
    """The numbers of red, green and blue that a file gives.

    Raises:
        ConfigError: they are not three numbers.
    """
    try:
        red, green, blue = (float(value) for value in values)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"{path} must give one number a colour, not {values}") from error
    return red, green, blue


def whole(path: Path, value: Any) -> int:
    """A positive whole number that a file gives.

    Raises:
        ConfigError: it is something else.
    """
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ConfigError(f"{path} gives {value!r} where a positive whole number belongs")
    return value


def head_width(path: Path, width: int, heads: Any) -> int:
    """Channels of one of the attention heads that a file counts.

    Raises:
        ConfigError: the channels do not divide into so many heads.
    """
    if width % whole(path, heads):
        raise ConfigError(f"{path}: {width} channels do not divide into {heads} heads")
    return width // int(heads)


def check_size(path: Path, key: str, said: Any, held: int) -> None:
    """Make sure that a file says the size that the weights beside it are for.

    Raises:
        ConfigError: it says another.
    """
    if said != held and list(said if isinstance(said, list | tuple) else ()) != [held, held]:
        raise ConfigError(f"{path} says {key} {said}, but the weights beside it are for {held}")
