"""Retrieval of a model on pairs: features by contiguous ranges over the ranks, then metrics."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from PIL.Image import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Subset

from twotower import metrics
from twotower.config import EvaluateConfig
from twotower.data.images import UnreadableImage, decode_image
from twotower.data.pairs import PairTable
from twotower.data.workers import plain_signals
from twotower.distributed import all_gather_objects, rank, shard_range, world_size
from twotower.models.dual_encoder import DualEncoder
from twotower.settings import ConfigError
from twotower.train_config import Precision

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class PictureInputs(Dataset["Tensor | None"]):
    """The image tower's input of each row: a transformed picture, or None if it cannot be read."""

    pairs: PairTable
    transform: Callable[[Image], Tensor]

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, row: int) -> Tensor | None:
        try:
            return self.transform(decode_image(self.pairs.path(row)))
        except UnreadableImage:
            return None


@dataclass(frozen=True)
class FeatureInputs(Dataset["Tensor | None"]):
    """The same for a locked tower: features (N, F) that were computed before."""

    features: Tensor

    def __len__(self) -> int:
        return len(self.features)

    def __getitem__(self, row: int) -> Tensor | None:
        return self.features[row]


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


def autocast(device: torch.device, precision: Precision) -> contextlib.AbstractContextManager[Any]:
    """The context that a forward pass of this precision runs in."""
    if precision is Precision.fp32:
        return contextlib.nullcontext()
    dtype = torch.bfloat16 if precision is Precision.bf16 else torch.float16
    return torch.autocast(device.type, dtype)


def _keep_readable(items: Sequence[Tensor | None]) -> tuple[Tensor | None, list[bool]]:
    readable = [item for item in items if item is not None]
    return (torch.stack(readable) if readable else None), [item is not None for item in items]


@torch.no_grad()
def pair_features(
    model: DualEncoder,
    pairs: PairTable,
    inputs: Dataset[Tensor | None],
    tokenizer: Callable[[Sequence[str]], Tensor],
    config: EvaluateConfig,
    device: torch.device,
    precision: Precision = Precision.fp32,
) -> tuple[Tensor, Tensor, Tensor, int]:
    """Unit-norm features of the readable images and of their captions, the same on every rank.

    Raises:
        ConfigError: no picture can be read.

    Returns:
        image features (N, D), caption features (C, D), rows of the captions' images (C,), and how
        many images could not be read: they and their captions are left out.
    """
    rows = shard_range(len(pairs), rank(), world_size())
    loader = DataLoader(
        Subset(inputs, rows),
        batch_size=config.batch_size,
        num_workers=config.num_workers,
        worker_init_fn=plain_signals,
        collate_fn=_keep_readable,
        generator=torch.Generator(),  # the model's random state must not depend on evaluations
    )
    features: list[Tensor] = []
    readable: list[bool] = []
    for images, kept in loader:
        readable += kept
        if images is not None:
            with autocast(device, precision):
                encoded = model.encode_image(images.to(device, non_blocking=True), normalize=True)
            features.append(encoded.float().cpu())
    readable = [flag for part in all_gather_objects(readable) for flag in part]
    if not any(readable):
        raise ConfigError(f"{pairs.name}: no picture can be read, for example {pairs.path(0)}")
    image_features = torch.cat([f for part in all_gather_objects(features) for f in part])
    captions, owner = pairs.all_captions()
    kept_image = torch.tensor(readable)
    new_row = kept_image.cumsum(0) - 1
    chosen = [index for index in range(len(captions)) if readable[int(owner[index])]]
    texts = [captions[chosen[i]] for i in shard_range(len(chosen), rank(), world_size())]
    encoded_texts = []
    for start in range(0, len(texts), config.batch_size):
        tokens = tokenizer(texts[start : start + config.batch_size]).to(device)
        with autocast(device, precision):
            encoded_texts.append(model.encode_text(tokens, normalize=True).float().cpu())
    text_features = torch.cat([f for part in all_gather_objects(encoded_texts) for f in part])
    return image_features, text_features, new_row[owner[chosen]], readable.count(False)


def measure_retrieval(
    model: DualEncoder,
    pairs: PairTable,
    inputs: Dataset[Tensor | None],
    tokenizer: Callable[[Sequence[str]], Tensor],
    config: EvaluateConfig,
    device: torch.device,
    precision: Precision = Precision.fp32,
    bootstrap: int = 0,
) -> RetrievalReport:
    """Measure a model on pairs, on all ranks together; every rank gets the report.

    Raises:
        ConfigError: no picture can be read, or there are no captions.
    """
    if not pairs.all_captions()[0]:
        raise ConfigError(f"{pairs.name} has no captions, so retrieval cannot be measured on it")
    was_training = model.training
    model.eval()
    images, texts, owner, unreadable = pair_features(
        model, pairs, inputs, tokenizer, config, device, precision
    )
    model.train(was_training)
    to_image = metrics.text_to_image_ranks(images, texts, owner)
    to_text = metrics.image_to_text_ranks(images, texts, owner)
    if unreadable:
        log.warning("%d images of %s cannot be read and are left out", unreadable, pairs.name)
    return RetrievalReport(
        metrics=metrics.retrieval_metrics(to_image, to_text),
        intervals=metrics.bootstrap_intervals(to_image, to_text, owner, bootstrap),
        images=len(images),
        captions=len(texts),
        unreadable=unreadable,
    )
