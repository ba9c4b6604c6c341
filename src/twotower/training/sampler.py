"""Which rows a step takes: one global order, cut among the ranks."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch.utils.data import Sampler

from twotower.settings import ConfigError


def check_batch_size(batch_size: int, images: int, world: int) -> None:
    """Refuse a global batch that the ranks cannot share or the data cannot fill.

    Raises:
        ConfigError: it names the nearest sizes that work.
    """
    if batch_size % world:
        below = batch_size // world * world
        raise ConfigError(
            f"train.batch_size is {batch_size}, which {world} processes cannot share evenly; "
            f"use {below or world} or {below + world}"
        )
    if batch_size > images:
        raise ConfigError(
            f"train.batch_size is {batch_size}, but there are {images} training images; lower it"
        )


class GlobalBatchSampler(Sampler[list[int]]):
    """Shuffled rows by seed and epoch, in global batches; a rank takes its contiguous part of each.

    The order does not depend on the number of ranks. The last incomplete batch of an epoch is
    dropped, so that every step has the same number of negatives.
    """

    def __init__(
        self, count: int, batch_size: int, seed: int, rank: int = 0, world: int = 1
    ) -> None:
        self.count, self.batch_size, self.seed = count, batch_size, seed
        self.rank, self.world = rank, world
        self.epoch = self.done = 0

    def set_position(self, epoch: int, done: int) -> None:
        """Choose the epoch whose order is drawn next, and how many of its batches to leave out."""
        self.epoch, self.done = epoch, done

    def __len__(self) -> int:
        """Batches a whole epoch."""
        return self.count // self.batch_size

    def __iter__(self) -> Iterator[list[int]]:
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch)
        order = torch.randperm(self.count, generator=generator)
        local = self.batch_size // self.world
        for batch in range(self.done, len(self)):
            start = batch * self.batch_size + self.rank * local
            yield order[start : start + local].tolist()
