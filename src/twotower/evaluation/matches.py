"""Which pictures some captions find: what the figures and tables of a validation show."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from twotower import metrics
from twotower.data.pairs import PairTable
from twotower.evaluation.features import PairFeatures


@dataclass(frozen=True)
class Found:
    """A picture that a caption was compared with.

    Attributes:
        path: its file.
        score: the cosine.
        own: whether it is the caption's own picture.
        same: whether another picture has the very same caption, and so is right as well.
    """

    path: Path
    score: float
    own: bool = False
    same: bool = False


@dataclass(frozen=True)
class Match:
    """A caption, the pictures it finds first, its own picture and the rank of that, from 1."""

    caption: str
    found: list[Found]
    own: Found
    rank: int


def choose_captions(owner: Tensor, count: int, seed: int) -> list[int]:
    """Up to `count` captions, the same for the same seed and data.

    Args:
        owner: (C,) rows of the captions' images.

    Returns:
        Numbers of captions: of different images as long as there are any, then others.
    """
    first: list[int] = []
    others: list[int] = []
    seen: set[int] = set()
    for caption in np.random.default_rng(seed).permutation(len(owner)).tolist():
        if len(first) == count:
            break
        image = int(owner[caption])
        (others if image in seen else first).append(caption)
        seen.add(image)
    return (first + others)[:count]


def distinct_pairs(owner: Tensor, count: int, seed: int) -> list[int]:
    """Up to `count` captions of different images, the first that `choose_captions` gives."""
    chosen = choose_captions(owner, count, seed)
    return list({int(owner[caption]): caption for caption in reversed(chosen)}.values())[::-1]


def find_matches(
    features: PairFeatures, pairs: PairTable, chosen: list[int], count: int
) -> list[Match]:
    """The `count` nearest pictures of the `chosen` captions, in the order that the metrics rank."""
    texts, owner = features.texts[chosen], features.owner[chosen]
    ranks = metrics.text_to_image_ranks(features.images, texts, owner).tolist()
    scores = texts @ features.images.T  # (chosen, N)
    # Stable, since equal scores rank by position; NaN comes first, as it does in the metrics.
    order = scores.sort(dim=1, descending=True, stable=True).indices[:, :count]
    twins = _twins(features, [features.captions[number] for number in chosen])
    matches = []
    for row, number in enumerate(chosen):
        caption, own = features.captions[number], int(owner[row])

        def found(image: int, row: int = row, caption: str = caption, own: int = own) -> Found:
            return Found(
                path=pairs.path(int(features.rows[image])),
                score=float(scores[row, image]),
                own=image == own,
                same=image != own and image in twins[caption],
            )

        nearest = [found(image) for image in order[row].tolist()]
        matches.append(Match(caption, nearest, found(own), ranks[row]))
    return matches


def _twins(features: PairFeatures, captions: list[str]) -> dict[str, set[int]]:
    """The images that have each of these captions."""
    images: dict[str, set[int]] = {caption: set() for caption in captions}
    for number, caption in enumerate(features.captions):
        if caption in images:
            images[caption].add(int(features.owner[number]))
    return images


def cosines(features: PairFeatures, chosen: list[int]) -> Tensor:
    """Each of the `chosen` captions against each one's picture: (n, n)."""
    return features.texts[chosen] @ features.images[features.owner[torch.tensor(chosen)]].T
