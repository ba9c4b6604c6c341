"""Pictures in one folder, captioned in a file beside it: what Flickr8k and Flickr30k share."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from pathlib import Path

from twotower.data.pairs import Pair, PairTable
from twotower.settings import ConfigError

log = logging.getLogger(__name__)

Row = tuple[str, str, str]
"""A picture's file name, one of its captions, and its split or nothing."""


def captioned_pairs(rows: Sequence[Row], images: Path, root: Path, listing: Path) -> PairTable:
    """The pictures that have a file, in the order of their first caption; the log counts the rest.

    Args:
        images: their folder, in `root`.
        listing: the file that the rows are of, for messages.

    Raises:
        ConfigError: there are no rows, or none of the pictures is there.
    """
    if not rows:
        raise ConfigError(f"{listing} has no captions; download it again")
    files = set(os.listdir(images))
    listed = {name for name, _, _ in rows}
    absent = listed - files
    if absent == listed:
        raise ConfigError(
            f"{images} has none of the {len(listed):,} pictures of {listing.name}, "
            f"for example {rows[0][0]}; unpack them there"
        )
    if absent:
        log.warning("%s: left out %d images that have no file", listing, len(absent))
    folder = images.relative_to(root)
    return PairTable.from_pairs(
        (
            Pair(str(folder / name), caption, split, name)
            for name, caption, split in rows
            if name in files
        ),
        root,
        str(root),
    )


def find_file(root: Path, folders: Sequence[str], *names: str) -> Path | None:
    """The first of some names that one of some folders of `root` has."""
    paths = (root / folder / name for name in names for folder in folders)
    return next((path for path in paths if path.is_file()), None)
