"""Rows and queries meet only if they were made in one way; else both fingerprints are named."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from twotower.embedding.layout import FINGERPRINT, SPACE, Manifest
from twotower.settings import ConfigError

# What makes two encodings of different rows: the field, and what the user calls it.
IDENTITY = {
    "checkpoint_sha256": "the checkpoint (SHA-256)",
    "source": "the source",
    "source_fingerprint": "the source's paths and captions (fingerprint)",
    "preprocessing": "the preparation of pictures",
    "tokenizer": "the tokenizer",
    "rows_kind": "encode.rows",
    "images": "encode.images",
    "texts": "captions encoded (encode.texts)",
    "columns": "encode.metadata",
    "dtype": "encode.dtype",
    "precision": "encode.precision",
    "compiled": "encode.compile",
    "batch_size": "encode.batch_size",
    "shard_rows": "encode.shard_rows",
}
LATE = ("preprocessing", "tokenizer", "batch_size")  # known once the checkpoint is loaded


def differences(there: Manifest, here: Manifest, *, device: bool = False) -> list[str]:
    """In what `here` is another encoding than `there`, in the user's words.

    How a checkpoint prepares its inputs, and `batch_size=auto`, are known only once it is loaded;
    before, they are empty. What a source is called (`pics`, `/data/pics`) makes no other one of it.

    Args:
        device: whether the kind of device counts, since one store is made on one kind.
    """
    unknown = {n for n in LATE if not (getattr(there, n) and getattr(here, n))}
    known = {name: words for name, words in IDENTITY.items() if name not in unknown}
    if there.source_fingerprint == here.source_fingerprint:
        del known["source"]
    if device:
        known["device"] = "the device"
    return _in_fields(there, here, known)


def _in_fields(there: Manifest, here: Manifest, names: Mapping[str, str]) -> list[str]:
    """In which of some fields they differ; `names` says what the user calls them."""
    return [
        f"{words} is {getattr(there, name)} there and {getattr(here, name)} here"
        for name, words in names.items()
        if getattr(there, name) != getattr(here, name)
    ]


def check_fingerprint(there: Manifest, there_is: str, here: Manifest, here_is: str) -> None:
    """Refuse to put rows together that were made in different ways.

    Args:
        there, here: two manifests; there_is, here_is: what to call their stores.

    Raises:
        ConfigError: the fingerprints differ.
    """
    if there.fingerprint != here.fingerprint:
        raise ConfigError(
            f"{there_is} has the fingerprint {there.fingerprint[:16]} and {here_is} "
            f"{here.fingerprint[:16]}, so their rows cannot be compared: "
            f"{'; '.join(_in_fields(there, here, FINGERPRINT))}"
        )


def check_space(
    there: Manifest, folder: Path, description: Mapping[str, Any], here_is: str
) -> None:
    """Refuse queries that were made in another way than the rows of a store.

    A store of the first version does not say how it was made; it is taken as it is.

    Args:
        there, folder: the store; description: `Encoder.description` of what makes the queries;
            here_is: what to call that.

    Raises:
        ConfigError: they do not live in one space.
    """
    here = dataclasses.replace(there, **description)
    if there.preprocessing and there.space != here.space:
        raise ConfigError(
            f"the store {folder} has the fingerprint {there.space[:16]} and {here_is} "
            f"{here.space[:16]}, so they cannot be compared: "
            f"{'; '.join(_in_fields(there, here, SPACE))}; encode again with "
            "encode.overwrite=true"
        )
