"""What is measured on: the pairs of a split, and the prompts of their classes."""

from __future__ import annotations

from dataclasses import dataclass

from twotower.config import ZeroShotConfig
from twotower.data.pairs import PairTable
from twotower.evaluation.prompts import Prompts, zeroshot_prompts


@dataclass(frozen=True)
class Examined:
    """Pairs to measure on, and the prompts of their classes where they have any."""

    pairs: PairTable
    prompts: Prompts | None = None


def examined(source: PairTable, split: str, max_images: int, zeroshot: ZeroShotConfig) -> Examined:
    """The first `max_images` images of a split, or all for 0, and their classes' prompts.

    Images without captions are left out, unless none has and zero-shot classification is possible.

    Raises:
        ConfigError: the split is missing, or has neither captions nor classes.
    """
    pairs = source.split(split)
    if pairs.has_captions() or pairs.classes() is None:
        pairs = pairs.with_captions()
    pairs = pairs.head(max_images)
    return Examined(pairs, zeroshot_prompts(zeroshot, source, pairs))
