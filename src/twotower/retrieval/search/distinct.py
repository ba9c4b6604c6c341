"""Near-duplicates among hits: of pictures that are nearly the same the best one stays."""

from __future__ import annotations

import numpy as np

from twotower.retrieval.index import AnyFloatArray, IdArray, unit_rows


def distinct(rows: AnyFloatArray, cosine: float, k: int) -> IdArray:
    """The places of the first k rows (N, D) that are not near an earlier one that stays.

    Near is a cosine of at least `cosine`. What a row is compared with stands before it, so more
    rows at the end change nothing in what was kept.
    """
    unit = unit_rows(rows)
    left = np.arange(len(unit))
    kept: list[int] = []
    while len(left) and len(kept) < k:
        first = left[0]
        kept.append(int(first))
        left = left[1:]
        left = left[unit[left] @ unit[first] < cosine]
    return np.array(kept, np.int64)
