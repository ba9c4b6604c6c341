"""Word lists that pictures are labelled with: a file or a URL, a list or a JSON tree."""

from __future__ import annotations

import hashlib
import json
import logging
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import requests

from twotower.checkpoint.atomic import replacing
from twotower.data.templates import words_of
from twotower.settings import ConfigError

log = logging.getLogger(__name__)

AGENT = "twotower (https://pypi.org/project/twotower)"
TIMEOUT = 20.0  # seconds that a server may be silent
DEEPEST = 100  # levels of a tree


@dataclass(frozen=True)
class Vocabulary:
    """Entries in their order: what each is called in the results, and in a prompt."""

    labels: tuple[str, ...]
    words: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.labels)


def load_vocabulary(
    source: str, cache: Path, max_bytes: int, *, refresh: bool = False
) -> Vocabulary:
    """The entries of a file or of an http(s) URL, each once.

    A text has an entry a line, or a label, a tab and the words for a prompt. In a JSON tree of
    objects and lists every leaf is an entry; its label is the path to it (`animal/dog/poodle`).
    What came from a URL is kept in the folder `cache` and fetched again only with `refresh`.

    Raises:
        ConfigError: it cannot be read or fetched, has more than `max_bytes`, is malformed, or has
            no entries.
    """
    is_url = re.match(r"https?://", source, re.IGNORECASE)
    data = _fetched(source, cache, max_bytes, refresh) if is_url else _read(source, max_bytes)
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ConfigError(f"the vocabulary {source} is not UTF-8 text") from error
    is_tree = text.lstrip().startswith(("{", "["))
    entries = list(_tree(source, text) if is_tree else _lines(source, text))
    if not entries:
        raise ConfigError(f"the vocabulary {source} has no entries")
    distinct = dict(reversed(entries))  # the first of those with one label
    labels = tuple(dict.fromkeys(label for label, _ in entries))
    if len(labels) < len(entries):
        log.warning("%s: left out %d repeated entries", source, len(entries) - len(labels))
    return Vocabulary(labels, tuple(distinct[label] for label in labels))


def _read(source: str, max_bytes: int) -> bytes:
    try:
        with open(source, "rb") as file:
            data = file.read(max_bytes + 1)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ConfigError(
            f"classify.vocabulary must be a file or an http(s) URL; {source}: {reason}"
        ) from error
    return _limited(source, data, max_bytes)


def _fetched(url: str, cache: Path, max_bytes: int, refresh: bool) -> bytes:
    kept = cache / f"{hashlib.sha256(url.encode()).hexdigest()[:16]}.txt"
    if kept.is_file() and not refresh:
        return _limited(url, kept.read_bytes(), max_bytes)
    data = bytearray()
    try:
        with requests.get(
            url, stream=True, timeout=TIMEOUT, headers={"User-Agent": AGENT}
        ) as response:
            response.raise_for_status()
            for piece in response.iter_content(1 << 16):
                data += piece
                if len(data) > max_bytes:
                    break
    except requests.RequestException as error:
        raise ConfigError(
            f"the vocabulary {url} cannot be fetched ({_reason(error)}); download it, and give the "
            "path of the file"
        ) from error
    found = _limited(url, bytes(data), max_bytes)
    with replacing(kept) as temporary:
        temporary.write_bytes(found)
    log.info("kept %s as %s", url, kept)
    return found


def _reason(error: requests.RequestException) -> str:
    if isinstance(error, requests.exceptions.InvalidSchema):
        return "it leads to an address that is not http(s)"
    status = error.response.status_code if error.response is not None else None
    return f"HTTP {status}" if status else type(error).__name__


def _limited(source: str, data: bytes, max_bytes: int) -> bytes:
    if len(data) > max_bytes:
        raise ConfigError(
            f"the vocabulary {source} has more than {max_bytes / 1e6:g} MB; raise "
            "classify.max_megabytes if it is meant to"
        )
    return data


def _lines(source: str, text: str) -> Iterator[tuple[str, str]]:
    for number, line in enumerate(text.splitlines(), start=1):
        label, words = (part.strip() for part in line.partition("\t")[::2])
        if "\t" in line and bool(label) != bool(words):
            raise ConfigError(f"{source}, line {number}: a label, a tab and words, not {line!r}")
        if label:
            yield label, words or words_of(label)


def _tree(source: str, text: str) -> Iterator[tuple[str, str]]:
    try:
        tree = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"the vocabulary {source} is not JSON: {error}") from error
    yield from _leaves(source, tree, (), 0)


def _leaves(source: str, node: Any, path: tuple[str, ...], depth: int) -> Iterator[tuple[str, str]]:
    """The leaves below a node: texts, and keys with nothing below them."""
    if depth > DEEPEST:
        raise ConfigError(f"the vocabulary {source} is deeper than {DEEPEST} levels")
    if isinstance(node, str) and node.strip():
        yield "/".join((*path, node.strip())), words_of(node)
    elif isinstance(node, list):
        for child in node:
            yield from _leaves(source, child, path, depth + 1)
    elif isinstance(node, dict):
        for key, child in node.items():
            if child in (None, "", [], {}):
                yield "/".join((*path, key)), words_of(key)
            else:
                yield from _leaves(source, child, (*path, key), depth + 1)
    else:
        where = "/".join(path) or "its top"
        raise ConfigError(
            f"the vocabulary {source} holds {json.dumps(node)} under {where}; a tree is made of "
            "objects, lists and words"
        )
