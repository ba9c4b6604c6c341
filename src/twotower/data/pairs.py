"""Image-text pairs: the data set that training reads, its batches, and the registry of sources."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.data import Dataset

from twotower.config import DataConfig
from twotower.data.images import UnreadableImage, stack_pictures, transformed
from twotower.data.table import SCHEMA, Pair, PairTable
from twotower.decoded import ImageTransform
from twotower.registry import Registry
from twotower.settings import ConfigError
from twotower.train_config import Pairing

__all__ = [
    "DATASETS",
    "PREPARERS",
    "SCHEMA",
    "Batch",
    "Collate",
    "ImageTextDataset",
    "Pair",
    "PairTable",
    "Sample",
    "Unreadable",
    "load_pairs",
    "prepare_pairs",
]


COLUMNS = 8  # the number of token columns is a multiple of it


class Unreadable(NamedTuple):
    """A picture that could not be decoded: its file and the reason in a few words."""

    path: str
    reason: str


class Sample(NamedTuple):
    """One training example: a uint8 picture (3, H, W), a caption, and the row of the image.

    `unreadable` lists the pictures that were passed over on the way to this one.
    """

    image: Tensor
    caption: str
    image_id: int
    unreadable: tuple[Unreadable, ...] = ()


class Batch(NamedTuple):
    """What a step takes: uint8 pictures (B, 3, H, W), token ids (B, L), and keys (B, 2) int64.

    The keys number the images and the captions: equal numbers, equal things. `unreadable` lists the
    pictures that were passed over; it travels in the batch because a loader's worker process has no
    other way to tell.
    """

    images: Tensor
    tokens: Tensor
    keys: Tensor
    unreadable: tuple[Unreadable, ...] = ()


class ImageTextDataset(Dataset[Sample]):
    """The pairs of a table with pictures transformed.

    With `Pairing.one` an item is an image, and each epoch it brings one of its captions, drawn by
    seed, epoch and row: so two captions of an image never meet in a batch as false negatives, and
    the draw does not depend on ranks or workers. Otherwise an item is a caption with its image. An
    unreadable picture is replaced by the next readable one and told in `Sample.unreadable`, so that
    no batch shrinks.
    """

    def __init__(
        self,
        pairs: PairTable,
        transform: ImageTransform,
        *,
        seed: int = 0,
        pairing: Pairing = Pairing.one,
    ) -> None:
        self.pairs = pairs
        self.transform = transform
        self.seed = seed
        self.epoch = 0
        self.captions: Sequence[str] | None = None
        self.owner = torch.arange(len(pairs))
        if pairing is not Pairing.one:
            self.captions, self.owner = pairs.all_captions()

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch whose captions are drawn; call it before the loader starts workers."""
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.owner)

    def __getitem__(self, item: int) -> Sample:
        """The picture and the caption of an item, or of the next readable one.

        Raises:
            ConfigError: no picture can be read.
        """
        passed_over: list[Unreadable] = []
        for step in range(len(self)):
            candidate = (item + step) % len(self)
            row = int(self.owner[candidate])
            path = self.pairs.path(row)
            try:
                with own_random_numbers(f"image/{self.seed}/{self.epoch}/{candidate}"):
                    image = transformed(path, self.transform)
            except UnreadableImage as error:
                passed_over.append(Unreadable(str(path), str(error)))
                continue
            return Sample(image, self.caption(candidate), row, tuple(passed_over))
        file, reason = passed_over[0]
        raise ConfigError(
            f"{self.pairs.name}: no picture can be read, for example {file}: {reason}"
        )

    def caption(self, item: int) -> str:
        """The caption that an item brings in this epoch."""
        return self.draw_caption(item) if self.captions is None else self.captions[item]

    def draw_caption(self, row: int) -> str:
        """The caption of a row in this epoch; an image without captions has the empty one."""
        captions = self.pairs.captions(row)
        if len(captions) < 2:
            return captions[0] if captions else ""
        return captions[random.Random(f"{self.seed}/{self.epoch}/{row}").randrange(len(captions))]


def caption_number(caption: str) -> int:
    """A number of 63 bits that identical captions share, whichever process asks."""
    digest = hashlib.blake2b(caption.strip().casefold().encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


@contextmanager
def own_random_numbers(name: str) -> Iterator[None]:
    """Within it torch draws the numbers that the name decides, and leaves its state as it was.

    So a picture is cropped the same whichever worker or rank loads it, and in a resumed run.
    """
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(random.Random(name).getrandbits(63))
        yield


def trim_padding(tokens: Tensor, pad_id: int) -> Tensor:
    """Token ids (B, L) without the columns that are padding in every row, but for a few.

    Their number is rounded up to a multiple of 8, so that compiled towers meet few shapes. Text
    towers leave padding out of the features of the words before it, so nothing else changes.
    """
    used = (tokens != pad_id).any(0).nonzero()
    longest = int(used[-1]) + 1 if len(used) else 1
    return tokens[:, : -(-longest // COLUMNS) * COLUMNS].contiguous()


@dataclass(frozen=True)
class Collate:
    """Turns samples into a `Batch`; a class so that worker processes can be sent it.

    `pad_id` is what fills up short captions; None where `tokenizer` gives something else than ids.
    """

    tokenizer: Callable[[Sequence[str]], Tensor]
    pad_id: int | None = None

    def __call__(self, samples: Sequence[Sample]) -> Batch:
        images, captions, image_ids, unreadable = zip(*samples, strict=True)
        tokens = self.tokenizer(captions)
        return Batch(
            stack_pictures(images),
            tokens if self.pad_id is None else trim_padding(tokens, self.pad_id),
            torch.tensor([image_ids, [caption_number(text) for text in captions]]).T,
            tuple(dict.fromkeys(chain.from_iterable(unreadable))),
        )


DATASETS: Registry[PairTable] = Registry("data")

PREPARERS: Registry[None] = Registry("prepare")
"""Functions `(config) -> None` of the sources that have something to lay out."""


def load_pairs(config: DataConfig) -> PairTable:
    """The images and captions of a data section.

    Raises:
        ConfigError: the source is missing, malformed or empty.
    """
    return DATASETS.build(config)


def prepare_pairs(config: DataConfig) -> PairTable:
    """Lay out a source, if it is one that can be laid out, and load it.

    Raises:
        ConfigError: it cannot be laid out, or as `load_pairs`.
    """
    if config.registered_name in PREPARERS:
        PREPARERS.build(config)
    return load_pairs(config)
