"""An index on disk: a folder with a manifest and one data file, seen whole or not at all."""

from __future__ import annotations

import dataclasses
import json
import secrets
from pathlib import Path
from typing import Any

from twotower.checkpoint.atomic import replacing
from twotower.config import IndexConfig
from twotower.retrieval.index import INDEXES, VectorIndex
from twotower.settings import ConfigError, from_plain, to_plain

FORMAT = 1
MANIFEST = "index.json"


def save_index(index: VectorIndex, folder: Path, fingerprint: str = "") -> None:
    """Write an index to a folder, replacing the one that is there.

    The data file has a new name each time and the manifest, which names it, is replaced last: a
    reader sees the old index or the new one. `fingerprint` says what it was made from.

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
    }
    with replacing(folder / MANIFEST) as temporary:
        temporary.write_text(json.dumps(manifest, indent=2) + "\n")
    for old in folder.glob("index-*.bin"):
        if not old.name.startswith(stem):
            old.unlink(missing_ok=True)


def load_index(
    folder: Path, fingerprint: str | None = None, asked: IndexConfig | None = None
) -> VectorIndex:
    """The index that `save_index` wrote, with what is `asked` of how it runs.

    Raises:
        ConfigError: there is none, it is damaged, or it has another fingerprint.
    """
    manifest = _read_manifest(folder)
    if fingerprint is not None and fingerprint != manifest["fingerprint"]:
        raise ConfigError(
            f"the index {folder} was built from other rows or with other settings; build it again"
        )
    config_class = INDEXES.config_class(manifest["kind"])
    config = from_plain(config_class, manifest["config"])
    if asked is not None:
        others = {name: getattr(asked, name) for name in IndexConfig.not_of_the_rows}
        config = dataclasses.replace(config, **others)
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


def _read_manifest(folder: Path) -> dict[str, Any]:
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
