"""A store's folder as a whole: cleared, replaced by another, brought back after a kill."""

from __future__ import annotations

import contextlib
from pathlib import Path

from twotower.embedding.layout import (
    DELETED,
    DONE,
    ERRORS,
    IMAGES,
    MANIFEST,
    METADATA,
    SOURCE,
    STATES,
    TEXTS,
)
from twotower.settings import ConfigError


def clear(folder: Path) -> None:
    """Remove a store's own files and nothing else; the folder goes if it is empty then."""
    patterns = [MANIFEST, ERRORS, DELETED, SOURCE, "source_[0-9]*.parquet"]
    patterns += [f".{name}.*.tmp" for name in patterns]
    kinds = (IMAGES, TEXTS, METADATA, DONE, STATES)
    for kind in kinds:
        patterns += [f"{kind}/{kind}_[0-9]*", f"{kind}/.{kind}_*.*.tmp"]
    for pattern in patterns:
        for path in folder.glob(pattern):
            path.unlink(missing_ok=True)
    for emptied in (*(folder / kind for kind in kinds), folder):
        if emptied.is_dir() and not any(emptied.iterdir()):
            emptied.rmdir()


def beside(store: Path, what: str) -> Path:
    """The folder `<store>.new` or `<store>.old` of an encoding that replaces another."""
    return store.with_name(f"{store.name}.{what}")


def replace_store(store: Path) -> None:
    """Put the finished `<store>.new` in the place of `store`, whose files are removed after that.

    Raises:
        ConfigError: the folders cannot be renamed.
    """
    old, new = beside(store, "old"), beside(store, "new")
    try:
        clear(old)
        store.rename(old)
        new.rename(store)
        clear(old)
    except OSError as error:
        raise ConfigError(f"cannot put {new} in the place of {store}: {error.strerror}") from error


def restore(store: Path) -> None:
    """Bring a store back that a kill in the middle of `replace_store` left under its other name."""
    if not store.exists() and (beside(store, "old") / MANIFEST).exists():
        # Under torchrun another rank may have done it in between.
        with contextlib.suppress(FileNotFoundError):
            beside(store, "old").rename(store)
