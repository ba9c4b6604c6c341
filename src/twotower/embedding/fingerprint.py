"""Rows and queries meet only if they were made in one way; else both fingerprints are named."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from twotower.embedding.layout import FINGERPRINT, SPACE, Manifest
from twotower.settings import ConfigError


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
            f"{'; '.join(there.differences_in(here, FINGERPRINT))}"
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
            f"{'; '.join(there.differences_in(here, SPACE))}; encode again with "
            "encode.overwrite=true"
        )
