"""The cleaned manifest: what stays, by absolute paths, with a split that keeps groups together."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.csv as pa_csv
import pyarrow.parquet as pq

from twotower.checkpoint.atomic import replacing
from twotower.data.pairs import PairTable
from twotower.data.splits import hash_order
from twotower.doctor_config import ManifestFormat

PROPOSED = "proposed_split"


def propose_split(
    ids: Sequence[str], group: npt.NDArray[np.int64], val_fraction: float, seed: int
) -> npt.NDArray[np.object_]:
    """`train` or `val` for each image, the same for all of a group: (N,).

    Groups come in an order that a hash of the seed and of their least id gives, and validate until
    the fraction is reached; one that would go past it trains. So a later image moves few others.
    """
    _, place, sizes = np.unique(group, return_inverse=True, return_counts=True)
    names: list[str] = [""] * len(sizes)
    for name, which in sorted(zip(ids, place.tolist(), strict=True), reverse=True):
        names[which] = name
    left = round(len(ids) * val_fraction)
    validates = np.zeros(len(sizes), bool)
    for which in hash_order(names, seed):
        if sizes[which] <= left:
            validates[which] = True
            left -= int(sizes[which])
        if not left:
            break
    return np.where(validates[place], "val", "train").astype(object)


def write_cleaned(
    path: Path, pairs: PairTable, stays: npt.NDArray[np.bool_], proposed: npt.NDArray[np.object_]
) -> None:
    """Write the images that stay as a manifest, a row a caption, in the source's order.

    Raises:
        ConfigError: the folder cannot be written.
    """
    rows = np.flatnonzero(stays)
    kept = pairs.take(rows)
    paths = [os.path.abspath(kept.path(row)) for row in range(len(kept))]
    table = kept.table.set_column(
        kept.table.schema.get_field_index("filepath"),
        "filepath",
        pa.array(paths, pa.large_string()),
    )
    if PROPOSED in table.column_names:
        table = table.drop_columns([PROPOSED])
    table = table.append_column(PROPOSED, pa.array(proposed[rows], pa.large_string()))
    manifest = PairTable(table.combine_chunks(), kept.root, kept.name).rows()
    with replacing(path) as temporary:
        if path.suffix == f".{ManifestFormat.parquet.name}":
            pq.write_table(manifest, temporary)
        else:
            flat = [f.name for f in manifest.schema if not pa.types.is_nested(f.type)]
            pa_csv.write_csv(manifest.select(flat), temporary)
