"""Images that a checkpoint hardly tells apart."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from twotower.console import progress
from twotower.data.pairs import PairTable
from twotower.embedding.encoder import Encoder
from twotower.quality.neighbours import Pairs, near_pairs


def near_by_embedding(
    encoder: Encoder, pairs: PairTable, rows: npt.NDArray[np.int64], least: float
) -> tuple[Pairs, npt.NDArray[np.float32]]:
    """Pairs (P, 2) of some rows whose image vectors have a cosine of `least` or more, and it: (P,).

    Args:
        encoder: encodes the pictures, on its device.
        rows: the rows to look at.
    """
    size = encoder.batch_size
    kept: list[int] = []
    parts = [np.empty((0, encoder.dim), np.float32)]
    with progress("encoding", len(rows), "images") as line:
        for first in range(0, len(rows), size):
            part = rows[first : first + size].tolist()
            paths: list[Path] = [pairs.path(row) for row in part]
            vectors = encoder.encode_images(paths, errors="none")
            kept += [row for row, vector in zip(part, vectors, strict=True) if vector is not None]
            parts += [vector[None] for vector in vectors if vector is not None]
            line.advance(len(part))
    base = torch.from_numpy(np.concatenate(parts)).to(encoder.device)
    near = near_pairs(base, lambda first, last: base[first:last, None], least)
    cosines = [
        (base[part[:, 0]] * base[part[:, 1]]).sum(1).cpu().numpy()
        for part in np.array_split(near, range(65536, len(near), 65536))
    ]
    return np.array(kept, np.int64)[near], np.concatenate(cosines)
