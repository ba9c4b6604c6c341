"""Zero-shot classification of a model (Radford et al. 2021, section 3.1), on all ranks together."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import Dataset, Subset

from twotower import metrics
from twotower.config import EvaluateConfig
from twotower.data.pairs import PairTable
from twotower.distributed import rank, shard_range, world_size
from twotower.evaluation.features import (
    PairFeatures,
    encode_images,
    encode_texts,
    evaluating,
    gathered,
    progress_line,
)
from twotower.evaluation.prompts import Prompts
from twotower.models.dual_encoder import DualEncoder
from twotower.settings import ConfigError
from twotower.train_config import Precision

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class ZeroShotReport:
    """What was measured, on how much.

    Attributes:
        metrics: `zeroshot_top1` and so on, and `zeroshot_mean_per_class`, in percent.
        absent: the k that were asked for and are more than the classes: top-k would mean nothing.
        classes: how many the images were told apart by.
        templates: prompts a class.
        images: how many were classified.
        unlisted: images left out because their class is not among the classes.
        unreadable: images left out because they cannot be read.
    """

    metrics: dict[str, float]
    absent: list[int]
    classes: int
    templates: int
    images: int
    unlisted: int
    unreadable: int

    def to_json(self) -> dict[str, Any]:
        """As JSON can hold it."""
        return dataclasses.asdict(self)

    def about(self) -> str:
        """In a sentence: what was classified by what, and what was left out."""
        text = (
            f"zero-shot: {self.images:,} images, {self.classes:,} classes, "
            f"{self.templates} templates"
        )
        if self.absent:
            tops = " and ".join(f"top-{k}" for k in self.absent)
            text += f"; {tops} left out, since there are only {self.classes} classes"
        for count, why in ((self.unlisted, "of no listed class"), (self.unreadable, "unreadable")):
            if count:
                text += f"; {count:,} images {why} left out"
        return text


def class_vectors(prompt_features: Tensor) -> Tensor:
    """A vector of unit norm a class: (K, T, D) unit-norm features of T prompts each -> (K, D).

    The mean of the prompts' features, normalised again (Radford et al. 2021, section 3.1.4).
    """
    return F.normalize(prompt_features.mean(1), dim=-1)


def encode_classes(
    model: DualEncoder,
    tokenizer: Callable[[Sequence[str]], Tensor],
    prompts: Prompts,
    config: EvaluateConfig,
    device: torch.device,
    precision: Precision,
) -> Tensor:
    """The vectors of all classes (K, D), each rank encoding its part; the same on every rank."""
    count = len(prompts.templates)
    vectors = [torch.empty(0)]
    # A few classes at a time, so that the prompts of all never stand in memory together.
    own = shard_range(len(prompts.words), rank(), world_size())
    step = max(1, config.batch_size // count)
    line = progress_line("encoding", len(own) * count, "prompts")
    for start in range(own.start, own.stop, step):
        classes = range(start, min(start + step, own.stop))
        texts = [text for number in classes for text in prompts.of_class(number)]
        encoded = encode_texts(model, tokenizer, texts, config, device, precision)
        vectors.append(class_vectors(encoded.view(len(classes), count, -1)))
        line.advance(len(texts))
    return gathered(torch.cat(vectors))


def measure_zeroshot(
    model: DualEncoder,
    pairs: PairTable,
    inputs: Dataset[Tensor | None],
    tokenizer: Callable[[Sequence[str]], Tensor],
    prompts: Prompts,
    config: EvaluateConfig,
    device: torch.device,
    precision: Precision = Precision.fp32,
    features: PairFeatures | None = None,
) -> ZeroShotReport:
    """Classify the images of `pairs` by prompts, on all ranks; every rank gets the report.

    Args:
        model: the model, or heads alone with `inputs` and a `tokenizer` of cached features (which
            must hold `prompts.texts()`).
        features: what `measure_pairs` made of the same model and pairs, to encode no image twice.

    Raises:
        ConfigError: the pairs have no classes, none of the classes, or no picture can be read.
    """
    labels = prompts.rows_of(pairs)
    listed = (labels >= 0).nonzero()[:, 0]
    with evaluating(model):
        vectors = encode_classes(model, tokenizer, prompts, config, device, precision)
        if features is None:
            asked = Subset(inputs, listed.tolist())
            images, places = encode_images(model, asked, config, device, precision)
            rows = listed[places]
        else:
            own = shard_range(len(features.rows), rank(), world_size())
            images = features.images[own.start : own.stop]
            rows = features.rows[own.start : own.stop]
    known = labels[rows] >= 0
    target = labels[rows][known]
    ranks = metrics.target_ranks(vectors.to(device), images[known].to(device), target.to(device))
    # Only ranks and labels travel: 16 bytes an image.
    ranks, target = gathered(ranks.cpu()), gathered(target)
    if not len(ranks):
        raise ConfigError(f"{pairs.name}: no picture can be read, for example {pairs.path(0)}")
    count = len(prompts.labels)
    tops = {f"zeroshot_top{k}": metrics.top_k_accuracy(ranks, k) for k in prompts.ks if k <= count}
    return ZeroShotReport(
        metrics={**tops, "zeroshot_mean_per_class": metrics.mean_per_class(ranks, target)},
        absent=[k for k in prompts.ks if k > count],
        classes=count,
        templates=len(prompts.templates),
        images=len(ranks),
        unlisted=len(labels) - len(listed),
        unreadable=len(listed) - len(ranks),
    )
