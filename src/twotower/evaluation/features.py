"""Features of pictures and captions: each rank encodes its part, and every rank gets all."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, Subset

from twotower.config import EvaluateConfig
from twotower.console import ProgressLine
from twotower.data.images import UnreadableImage, stack_pictures, transformed
from twotower.data.pairs import PairTable, own_random_numbers
from twotower.data.workers import plain_signals
from twotower.decoded import ImageTransform
from twotower.distributed import all_gather_objects, is_main_process, rank, shard_range, world_size
from twotower.models.dual_encoder import DualEncoder
from twotower.prefetch import PrefetchToDevice
from twotower.settings import ConfigError
from twotower.train_config import Precision


@dataclass(frozen=True)
class PictureInputs(Dataset["Tensor | None"]):
    """The image tower's input of each row: a transformed picture, or None if it cannot be read."""

    pairs: PairTable
    transform: ImageTransform

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, row: int) -> Tensor | None:
        try:
            return transformed(self.pairs.path(row), self.transform)
        except UnreadableImage:
            return None


@dataclass(frozen=True)
class PictureViews(PictureInputs):
    """The same through a random transform: of each picture the view of this number."""

    view: int

    def __getitem__(self, row: int) -> Tensor | None:
        with own_random_numbers(f"view/{self.view}/{row}"):
            return super().__getitem__(row)


@dataclass(frozen=True)
class FeatureInputs(Dataset["Tensor | None"]):
    """The same for a locked tower: features (N, F) that were computed before."""

    features: Tensor

    def __len__(self) -> int:
        return len(self.features)

    def __getitem__(self, row: int) -> Tensor | None:
        return self.features[row]


def autocast(device: torch.device, precision: Precision) -> contextlib.AbstractContextManager[Any]:
    """The context that a forward pass of this precision runs in."""
    if precision is Precision.fp32:
        return contextlib.nullcontext()
    dtype = torch.bfloat16 if precision is Precision.bf16 else torch.float16
    return torch.autocast(device.type, dtype)


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients; afterwards the model is in the mode that it was in."""
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(was_training)


def _keep_readable(items: Sequence[Tensor | None]) -> tuple[Tensor | None, list[bool]]:
    readable = [item for item in items if item is not None]
    return (stack_pictures(readable) if readable else None), [item is not None for item in items]


def readable_features(
    forward: Callable[[Tensor], Tensor],
    inputs: Dataset[Tensor | None],
    *,
    batch_size: int,
    num_workers: int,
    device: torch.device,
    precision: Precision,
    line: ProgressLine,
) -> tuple[Tensor, Tensor]:
    """`forward` of the inputs that can be read, and which of them those are, (N,) bool.

    The features are (n, F), on the CPU, in fp32; where nothing can be read, an empty vector.
    """
    loader: DataLoader[Tensor | None] = DataLoader(
        inputs,
        batch_size=batch_size,
        num_workers=num_workers,
        worker_init_fn=plain_signals,
        collate_fn=_keep_readable,
        pin_memory=device.type == "cuda",
        generator=torch.Generator(),  # the model's random state must not depend on evaluations
    )
    pipeline = PrefetchToDevice(device)

    def compute(batch: tuple[Tensor | None, list[bool]]) -> Tensor:
        images, _ = batch
        if images is None:
            return torch.empty(0)
        with autocast(device, precision):
            return forward(pipeline.put(images)).float()

    features = [torch.empty(0)]
    readable: list[bool] = []
    for (_, kept), encoded in pipeline.run(loader, compute):
        readable += kept
        features.append(encoded)
        line.advance(len(kept))
    return torch.cat(features), torch.tensor(readable, dtype=torch.bool)


def progress_line(what: str, total: int, unit: str) -> ProgressLine:
    """A line in the log every ten seconds, of the first rank; no bar, since training has one."""
    return ProgressLine(what, total if is_main_process() else 0, unit, None)


def gathered(part: Tensor) -> Tensor:
    """Each rank's rows, in rank order, on every rank; a part without rows may be of any width."""
    return torch.cat(all_gather_objects(part))


def encode_images(
    model: DualEncoder,
    inputs: Dataset[Tensor | None],
    config: EvaluateConfig,
    device: torch.device,
    precision: Precision,
) -> tuple[Tensor, Tensor]:
    """This rank's part of `inputs`: unit-norm features (n, D) of what can be read, and its rows.

    The features are on the CPU, in fp32; where nothing can be read they are an empty vector.
    """
    own = shard_range(len(inputs), rank(), world_size())  # type: ignore[arg-type]
    features, readable = readable_features(
        partial(model.encode_image, normalize=True),
        Subset(inputs, own),
        batch_size=config.batch_size,
        num_workers=config.num_workers,
        device=device,
        precision=precision,
        line=progress_line("encoding", len(own), "images"),
    )
    return features, own.start + readable.nonzero()[:, 0]


def encode_texts(
    model: DualEncoder,
    tokenizer: Callable[[Sequence[str]], Tensor],
    texts: Sequence[str],
    config: EvaluateConfig,
    device: torch.device,
    precision: Precision,
) -> Tensor:
    """Unit-norm features (n, D) of texts, on the CPU, in fp32."""
    features = [torch.empty(0)]
    for start in range(0, len(texts), config.batch_size):
        tokens = tokenizer(texts[start : start + config.batch_size]).to(device)
        with autocast(device, precision):
            features.append(model.encode_text(tokens, normalize=True).float().cpu())
    return torch.cat(features)


@dataclass(frozen=True, kw_only=True)
class PairFeatures:
    """Unit-norm features of a table's readable images and of their captions, in the table's order.

    Attributes:
        images: (N, D).
        texts: (C, D).
        owner: (C,) row of each caption's image in `images`.
        rows: (N,) row of each image in the table.
        captions: the texts.
        unreadable: images that are left out, with their captions.
    """

    images: Tensor
    texts: Tensor
    owner: Tensor
    rows: Tensor
    captions: list[str]
    unreadable: int


def pair_features(
    model: DualEncoder,
    pairs: PairTable,
    inputs: Dataset[Tensor | None],
    tokenizer: Callable[[Sequence[str]], Tensor],
    config: EvaluateConfig,
    device: torch.device,
    precision: Precision = Precision.fp32,
) -> PairFeatures:
    """Encode images and captions, each rank its part; every rank gets all.

    Args:
        inputs: the image tower's input of each row of `pairs`, None where it cannot be read.
        tokenizer: captions -> the text tower's input.

    Raises:
        ConfigError: no picture can be read, or there are no captions.
    """
    with evaluating(model):
        part, own_rows = encode_images(model, inputs, config, device, precision)
        images, rows = gathered(part), gathered(own_rows)
        if not len(rows):
            raise ConfigError(f"{pairs.name}: no picture can be read, for example {pairs.path(0)}")
        captions, owner = pairs.all_captions()
        place = torch.full((len(pairs),), -1)
        place[rows] = torch.arange(len(rows))
        owner = place[owner]  # -1 where the image cannot be read
        kept = (owner >= 0).nonzero()[:, 0].tolist()
        if not kept:
            raise ConfigError(f"{pairs.name} has no captions, so retrieval cannot be measured")
        captions = [captions[index] for index in kept]
        own = shard_range(len(captions), rank(), world_size())
        texts = captions[own.start : own.stop]
        encoded = encode_texts(model, tokenizer, texts, config, device, precision)
    return PairFeatures(
        images=images,
        texts=gathered(encoded),
        owner=owner[kept],
        rows=rows,
        captions=captions,
        unreadable=len(pairs) - len(rows),
    )
