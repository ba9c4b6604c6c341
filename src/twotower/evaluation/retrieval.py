"""Retrieval of a model on pairs: ranks of queries, each rank computing its part, then metrics."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import Dataset

from twotower import metrics
from twotower.config import EvaluateConfig
from twotower.data.pairs import PairTable
from twotower.distributed import rank, shard_range, world_size
from twotower.evaluation.features import PairFeatures, gathered, pair_features
from twotower.models.dual_encoder import DualEncoder
from twotower.train_config import Precision

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class RetrievalReport:
    """What was measured, on how much."""

    metrics: dict[str, float]
    intervals: dict[str, tuple[float, float]]
    images: int
    captions: int
    unreadable: int

    def to_json(self) -> dict[str, Any]:
        """As JSON can hold it."""
        return dataclasses.asdict(self)


def rank_pairs(features: PairFeatures, device: torch.device) -> tuple[Tensor, Tensor]:
    """Ranks of caption -> image (C,) and of image -> caption (N,), each rank computing its part."""
    images, texts = features.images.to(device), features.texts.to(device)
    owner = features.owner.to(device)
    own = shard_range(len(texts), rank(), world_size())
    part = slice(own.start, own.stop)
    to_image = metrics.text_to_image_ranks(images, texts[part], owner[part])
    own = shard_range(len(images), rank(), world_size())
    to_text = metrics.image_to_text_ranks(images, texts, owner, images=own)
    return gathered(to_image.cpu()), gathered(to_text.cpu())


class Measured(NamedTuple):
    """A report, and the features that it is of: for figures, and for zero-shot classification."""

    report: RetrievalReport
    features: PairFeatures


def measure_pairs(
    model: DualEncoder,
    pairs: PairTable,
    inputs: Dataset[Tensor | None],
    tokenizer: Callable[[Sequence[str]], Tensor],
    config: EvaluateConfig,
    device: torch.device,
    precision: Precision = Precision.fp32,
    bootstrap: int = 0,
) -> Measured:
    """Measure retrieval on pairs, on all ranks together; every rank gets the same.

    Raises:
        ConfigError: no picture can be read, or there are no captions.
    """
    features = pair_features(model, pairs, inputs, tokenizer, config, device, precision)
    to_image, to_text = rank_pairs(features, device)
    if features.unreadable:
        log.warning(
            "%d images of %s cannot be read and are left out", features.unreadable, pairs.name
        )
    report = RetrievalReport(
        metrics=metrics.retrieval_metrics(to_image, to_text),
        intervals=metrics.bootstrap_intervals(to_image, to_text, features.owner, bootstrap),
        images=len(features.images),
        captions=len(features.texts),
        unreadable=features.unreadable,
    )
    return Measured(report, features)
