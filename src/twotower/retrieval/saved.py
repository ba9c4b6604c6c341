"""An index on disk: a folder with a manifest and one data file, seen whole or not at all."""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from twotower.checkpoint.atomic import replacing
from twotower.config import IndexConfig
from twotower.retrieval.index import INDEXES, VectorIndex
from twotower.settings import ConfigError, from_plain, to_plain

FORMAT = 2
MANIFEST = "index.json"
ABANDONED_SECONDS = 86_400


def save_index(
    index: VectorIndex,
    folder: Path,
    fingerprint: str = "",
    about: Mapping[str, Any] | None = None,
) -> Path:
    """Write an index to a folder, replacing the one that is there.

    The data file has a new name each time and the manifest, which names it, is replaced last: a
    reader sees the old index or the new one. Of two that save at once the later one stays, whole;
    the files of the other may stay beside it for a day or more. `fingerprint` says what it was
    made from, in one word; `about`, which JSON can hold, tells it to people.

    Returns:
        The data file.

    Raises:
        ConfigError: the folder cannot be written.
    """
    stem = f"index-{secrets.token_hex(8)}"  # further files may begin with it
    name = f"{stem}.bin"
    with replacing(folder / name) as temporary:
        index.write(temporary)
    manifest = {
        "format": FORMAT,
        "kind": index.config.registered_name,
        "config": to_plain(index.config),
        "dim": index.dim,
        "rows": len(index),
        "fingerprint": fingerprint,
        "file": name,
        "about": dict(about or {}),
    }
    before = _named_file(folder)
    with replacing(folder / MANIFEST) as temporary:
        temporary.write_text(json.dumps(manifest, indent=2) + "\n")
    for file in folder.glob("index-*.bin"):
        # Only what was replaced here: other files may be those of another saver.
        if file.name.startswith((f"{before}.", f"{before}-")) or (
            not file.name.startswith(stem) and _is_abandoned(file)
        ):
            file.unlink(missing_ok=True)
    for file in folder.glob(".index*.tmp"):
        if _is_abandoned(file):
            file.unlink(missing_ok=True)
    return folder / name


def _named_file(folder: Path) -> str:
    """What the names of the files begin with that the manifest of a folder stands for."""
    try:
        return Path(json.loads((folder / MANIFEST).read_text())["file"]).stem
    except (OSError, ValueError, KeyError, TypeError):
        return MANIFEST  # none; no data file is called so


def _is_abandoned(file: Path) -> bool:
    """Whether nobody has written to a file for a day: its saver was killed, or overtaken."""
    try:
        return time.time() - file.stat().st_mtime > ABANDONED_SECONDS
    except OSError:  # its saver has just finished
        return False


def load_index(
    folder: Path, fingerprint: str | None = None, config: IndexConfig | None = None
) -> VectorIndex:
    """The index that `save_index` wrote.

    Args:
        config: settings to search it with, if they are those of another search of the same kind of
            index; by default those that it was saved with.

    Raises:
        ConfigError: there is none, it is damaged, or it has another fingerprint.
    """
    manifest = read_manifest(folder)
    try:
        return _load(folder, manifest, fingerprint, config)
    except ConfigError:
        now = read_manifest(folder)
        if now == manifest:
            raise
    return _load(folder, now, fingerprint, config)  # it was replaced meanwhile


def _load(
    folder: Path, manifest: Mapping[str, Any], fingerprint: str | None, config: IndexConfig | None
) -> VectorIndex:
    """The index of a manifest; see `load_index`."""
    if fingerprint is not None and fingerprint != manifest["fingerprint"]:
        raise ConfigError(
            f"the index {folder} was built from other rows or with other settings; build it again"
        )
    if config is None or config.registered_name != manifest["kind"]:
        config = saved_config(manifest)
    index = INDEXES.build(config, manifest["dim"])
    try:
        index.read(folder / manifest["file"])
    except ConfigError:
        raise
    except Exception as error:
        # Whatever a reader throws at bytes that are cut: to the user the file is damaged.
        raise ConfigError(f"the index {folder} is damaged; build it again") from error
    if len(index) != manifest["rows"]:
        raise ConfigError(f"the index {folder} is damaged; build it again")
    return index


def saved_config(manifest: Mapping[str, Any]) -> IndexConfig:
    """The settings that an index was saved with."""
    config_class = INDEXES.config_class(manifest["kind"])
    assert issubclass(config_class, IndexConfig)
    return from_plain(config_class, manifest["config"])


def read_manifest(folder: Path) -> dict[str, Any]:
    """What stands in the manifest of a saved index.

    Raises:
        ConfigError: there is none, or it is damaged or of another version.
    """
    try:
        manifest: dict[str, Any] = json.loads((folder / MANIFEST).read_text())
        if manifest["format"] != FORMAT or manifest["kind"] not in set(INDEXES):
            raise ConfigError(
                f"the index {folder} was written by another version of twotower; build it again"
            )
    except FileNotFoundError as error:
        raise ConfigError(f"{folder} holds no index; build one first") from error
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"the index {folder} is damaged; build it again") from error
    return manifest
