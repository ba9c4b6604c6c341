"""Dividing images into training and validation: by a seed, stable when images are added."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import blake2b

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from twotower.config import MAX_SEED, DataConfig
from twotower.data.pairs import PairTable
from twotower.settings import setting


@dataclass(kw_only=True)
class SplitConfig(DataConfig):
    """The fields of every source that may come without splits of its own."""

    val_fraction: float = setting(
        0.1, "share of the images that validate, where the source has no splits", ge=0, lt=1
    )
    split_seed: int = setting(0, "seed of that choice", ge=0, le=MAX_SEED)


def hash_order(keys: Sequence[str], seed: int) -> npt.NDArray[np.int64]:
    """The positions (N,) of `keys` in an order that looks random: by a hash of seed and key."""
    salt = str(seed).encode()
    digests = (blake2b(key.encode(), digest_size=8, key=salt).digest() for key in keys)
    hashes = np.fromiter((int.from_bytes(d, "big") for d in digests), np.uint64, len(keys))
    return np.argsort(hashes, kind="stable")


def draw_splits(pairs: PairTable, val_fraction: float, seed: int) -> PairTable:
    """Call each image `train` or `val`, whatever split it had.

    An image's place in the order is the hash of its id, so that adding images moves only the few at
    the border. A fraction above 0 gives at least one image to either split if there are two.
    """
    count = len(pairs)
    val = round(count * val_fraction)
    if val_fraction > 0 and count > 1:
        val = min(max(val, 1), count - 1)
    splits = np.full(count, "train", dtype=object)
    splits[hash_order(pairs.table["image_id"].to_pylist(), seed)[:val]] = "val"
    column = pairs.table.schema.get_field_index("split")
    drawn = pa.array(splits, pa.large_string())
    return PairTable(pairs.table.set_column(column, "split", drawn), pairs.root, pairs.name)


def with_val(pairs: PairTable, config: SplitConfig) -> PairTable:
    """The images with a split each: `val` is drawn of those that train where there is none.

    Where no image has a split, all of them are drawn.
    """
    splits = pairs.table["split"].to_pylist()
    if not any(splits):
        return draw_splits(pairs, config.val_fraction, config.split_seed)
    if "val" in splits or "train" not in splits:
        return pairs
    trains = np.flatnonzero([split == "train" for split in splits])
    drawn = draw_splits(pairs.take(trains), config.val_fraction, config.split_seed)
    column = np.array(splits, dtype=object)
    column[trains] = drawn.table["split"].to_pylist()
    place = pairs.table.schema.get_field_index("split")
    table = pairs.table.set_column(place, "split", pa.array(column, pa.large_string()))
    return PairTable(table, pairs.root, pairs.name)
