"""The tars that a user names: with braces, stars, as a folder, as URLs, and several of these."""

from __future__ import annotations

import glob
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from twotower.settings import ConfigError

BRACES = re.compile(r"\{([^{}]*)\}")
NUMBERS = re.compile(r"(\d+)\.\.(\d+)")
SILENCE = 60.0  # seconds that a web server may take for an answer or its next bytes


def expand(pattern: str) -> list[str]:
    """The tars that a pattern names, in order.

    Raises:
        ConfigError: there is none, or a folder or a file that it names is not there.
    """
    found: list[str] = []
    for one in pattern.split("::"):
        for name in expand_braces(one.strip()):
            found += _glob(name.removeprefix("file://"))
    return found


def expand_braces(pattern: str) -> list[str]:
    """`{08..10}.tar` -> 08.tar, 09.tar, 10.tar; `{a,b}.tar` -> a.tar, b.tar; any number of them."""
    braces = BRACES.search(pattern)
    if braces is None:
        return [pattern]
    numbers = NUMBERS.fullmatch(braces[1])
    choices: Sequence[str] = braces[1].split(",")
    if numbers:
        first, last = int(numbers[1]), int(numbers[2])
        if last < first:
            raise ConfigError(f"{pattern}: {{{braces[1]}}} runs backwards")
        choices = [f"{n:0{len(numbers[1])}}" for n in range(first, last + 1)]
    before, after = pattern[: braces.start()], pattern[braces.end() :]
    return [name for choice in choices for name in expand_braces(before + choice + after)]


def is_remote(name: str) -> bool:
    """Whether a name is a URL."""
    return "://" in name


def _glob(name: str) -> list[str]:
    """A name itself, or what its stars or its folder hold; local ones as absolute paths."""
    if is_remote(name):
        if "*" not in name:
            return [name]
        system, path = filesystem(name)
        try:
            found = [system.unstrip_protocol(match) for match in sorted(system.glob(path))]
        except Exception as error:  # a file system of fsspec may raise what its library does
            raise ConfigError(f"{name} cannot be listed: {error}") from error
    elif os.path.isdir(name):
        found = sorted(str(path.absolute()) for path in Path(name).glob("*.tar"))
    elif "*" in name:
        found = sorted(os.path.abspath(match) for match in glob.glob(name))
    else:
        if not os.path.isfile(name):
            raise ConfigError(f"there is no tar {name}; data.tars must name tars or a folder")
        found = [os.path.abspath(name)]
    if not found:
        raise ConfigError(f"{name} has no tars; data.tars must name tars or a folder of them")
    return found


def filesystem(url: str) -> tuple[Any, str]:
    """The file system of a URL by fsspec, and what it calls the file.

    Raises:
        ConfigError: there is no such protocol, or its package is not installed.
    """
    import fsspec

    try:
        options = _patient() if url.startswith(("http://", "https://")) else {}
        system, path = fsspec.core.url_to_fs(url, **options)
    except ValueError as error:
        raise ConfigError(f"{url} cannot be opened: {error}") from error
    except ImportError as error:
        raise ConfigError(
            f"{url} cannot be opened: {error} (for http, pip install 'twotower[http]')"
        ) from error
    return system, path


def _patient() -> dict[str, Any]:
    """Options of fsspec's HTTP: a tar may take longer than the five minutes that aiohttp gives."""
    from aiohttp import ClientTimeout

    return {
        "client_kwargs": {"timeout": ClientTimeout(None, sock_connect=SILENCE, sock_read=SILENCE)}
    }
