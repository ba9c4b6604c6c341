"""Which items a step takes: one global order, cut among the ranks."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.utils.data import Sampler

from twotower.settings import ConfigError
from twotower.train_config import Pairing


def check_batch_size(batch_size: int, images: int, world: int, micro_batch_size: int = 0) -> None:
    """Refuse a global batch that the ranks cannot share or the data cannot fill.

    Raises:
        ConfigError: it names the nearest sizes that work.
    """
    unit = world * (micro_batch_size or 1)
    if unit > batch_size and micro_batch_size:
        raise ConfigError(
            f"train.micro_batch_size is {micro_batch_size}, more than the {batch_size // world} "
            f"pairs of train.batch_size={batch_size} that each of {world} processes gets; lower it"
        )
    if batch_size % unit:
        below = batch_size // unit * unit
        whom = f"{world} processes" if world > 1 else "one process"
        parts = f" in micro-batches of {micro_batch_size}" if micro_batch_size else ""
        raise ConfigError(
            f"train.batch_size is {batch_size}, which {whom} cannot share evenly{parts}; "
            f"use {below or unit} or {below + unit}"
        )
    if batch_size > images:
        raise ConfigError(
            f"train.batch_size is {batch_size}, but there are {images} training images; lower it"
        )


class GlobalBatchSampler(Sampler[list[int]]):
    """Shuffled items by seed and epoch, in global batches; a rank takes its part of each.

    The order does not depend on the number of ranks. Incomplete batches are dropped, so that every
    step has the same number of negatives: the last of an epoch, and with `Pairing.separate` the
    last of each of its rounds.

    Args:
        owner: (n,) the image of each item; items of an image stand side by side.
        pairing: `group` keeps the items of an image side by side in the order; `separate` goes over
            the images in rounds, an item each, so that two items of an image are never in one
            batch; otherwise the order is free.
    """

    def __init__(
        self,
        owner: Tensor,
        batch_size: int,
        seed: int,
        rank: int = 0,
        world: int = 1,
        pairing: Pairing = Pairing.one,
    ) -> None:
        self.batch_size, self.seed = batch_size, seed
        self.rank, self.world, self.pairing = rank, world, pairing
        self.owner = owner
        self.counts = torch.unique_consecutive(self.owner, return_counts=True)[1]
        self.epoch = self.done = 0

    def set_position(self, epoch: int, done: int) -> None:
        """Choose the epoch whose order is drawn next, and how many of its batches to leave out."""
        self.epoch, self.done = epoch, done

    def __len__(self) -> int:
        """Batches a whole epoch."""
        if self.pairing is Pairing.separate:
            rounds = int(self.counts.amax())
            return sum(
                int((self.counts > number).sum()) // self.batch_size for number in range(rounds)
            )
        return len(self.owner) // self.batch_size

    def order(self) -> Tensor:
        """The items of the current epoch, cut to whole batches."""
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch)
        items = torch.randperm(len(self.owner), generator=generator)
        if self.pairing is Pairing.group:
            place = torch.randperm(len(self.counts), generator=generator)
            group = torch.repeat_interleave(place, self.counts)
            items = items[torch.argsort(group[items], stable=True)]
        elif self.pairing is Pairing.separate:
            # The how-manieth of its image an item is, in the drawn order.
            by_image = items[torch.argsort(self.owner[items], stable=True)]
            first = torch.repeat_interleave(self.counts.cumsum(0) - self.counts, self.counts)
            number = torch.empty_like(items)
            number[by_image] = torch.arange(len(items)) - first
            rounds = [items[number[items] == n] for n in range(int(self.counts.amax()))]
            items = torch.cat([r[: len(r) // self.batch_size * self.batch_size] for r in rounds])
        return items[: len(self) * self.batch_size]

    def __iter__(self) -> Iterator[list[int]]:
        order = self.order()
        local = self.batch_size // self.world
        for batch in range(self.done, len(self)):
            start = batch * self.batch_size + self.rank * local
            yield order[start : start + local].tolist()
