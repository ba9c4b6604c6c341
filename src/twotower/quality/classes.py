"""How even the classes of a source are."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any


def balance(classes: Sequence[str | None], splits: Sequence[str]) -> dict[str, Any]:
    """Images a class, the largest first, and what is uneven about them.

    `only_outside_train` names classes that training never shows, where there is training.
    """
    counts = Counter(label for label in classes if label is not None)
    trained = {label for label, split in zip(classes, splits, strict=True) if split == "train"}
    sizes = sorted(counts.values())
    return {
        "classes": len(counts),
        "images_without_class": len(classes) - counts.total(),
        "largest": sizes[-1] if sizes else 0,
        "smallest": sizes[0] if sizes else 0,
        "median": sizes[len(sizes) // 2] if sizes else 0,
        "only_outside_train": sorted(counts.keys() - trained) if "train" in splits else [],
        "images": dict(counts.most_common()),
    }
