"""Which rows of a store's files count after updates, which append and never rewrite."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt

from twotower.embedding.layout import DELETED, IntArray, Manifest
from twotower.settings import ConfigError

Mask = npt.NDArray[np.bool_]


def deleted_ids(folder: Path, manifest: Manifest) -> IntArray:
    """The ids of rows that updates have deleted, in the order in which they did.

    Raises:
        ConfigError: the list is missing or cut.
    """
    count = manifest.deleted
    if not count:
        return np.empty(0, np.int64)
    path = folder / DELETED
    try:
        # A kill in the middle of an update leaves a longer list than the manifest counts.
        ids: IntArray = np.load(path)[:count]
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path} cannot be read; encode again") from error
    if len(ids) < count:
        raise ConfigError(f"{path} holds {len(ids)} ids, not {count}; encode again")
    return ids


def alive_rows(folder: Path, manifest: Manifest, stored_ids: IntArray) -> list[Mask]:
    """Which rows of each shard's files count.

    Of rows with one id the last one counts: an update appends what has changed.

    Args:
        stored_ids: of all rows of the files, in their order.

    Raises:
        ConfigError: they are not as many as the manifest says.
    """
    _, from_the_end = np.unique(stored_ids[::-1], return_index=True)
    alive: Mask = np.zeros(len(stored_ids), bool)
    alive[len(stored_ids) - 1 - from_the_end] = True
    alive &= ~np.isin(stored_ids, deleted_ids(folder, manifest))
    if np.count_nonzero(alive) != manifest.rows:
        raise ConfigError(
            f"the store {folder} is damaged: its manifest counts {manifest.rows} rows, and its "
            f"files hold {np.count_nonzero(alive)}; encode again with encode.overwrite=true"
        )
    ends = np.cumsum([shard.rows for shard in manifest.shards])
    return np.split(alive, ends[:-1])
