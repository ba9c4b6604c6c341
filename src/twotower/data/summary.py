"""What a data set holds, in a few lines for the user."""

from __future__ import annotations

from collections import Counter

import pyarrow.compute as pc

from twotower.data.pairs import PairTable


def summary(pairs: PairTable) -> str:
    """Images and captions, whole and by split, and where they are: a line each."""
    images: Counter[str] = Counter()
    captions: Counter[str] = Counter()
    counts = pc.list_value_length(pairs.table["captions"]).to_pylist()
    for split, count in zip(pairs.table["split"].to_pylist(), counts, strict=True):
        images[split] += 1
        captions[split] += count
    lines = [f"{pairs.name}: {images.total():,} images, {captions.total():,} captions"]
    lines += [f"  {s}: {images[s]:,} images, {captions[s]:,} captions" for s in images]
    return "\n".join([*lines, f"  in {pairs.root}"])
