"""What the steps are fed with: this rank's part of each global batch, on the device."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import Any

import torch
from torch.utils.data import DataLoader

from twotower.data.pairs import Batch, Collate
from twotower.data.workers import plain_signals
from twotower.distributed import local_world_size, rank, world_size
from twotower.train_config import Pairing, TrainConfig
from twotower.training.gradient import Inputs
from twotower.training.health import StepClock
from twotower.training.inputs import TrainingInputs
from twotower.training.sampler import GlobalBatchSampler, check_batch_size

log = logging.getLogger(__name__)


class Feed:
    """The batches of this rank in their order, from any step on.

    Args:
        inputs: the data.
        config: how large a batch is, and who loads it.
        seed: decides the order.
        device: where batches go.

    Raises:
        ConfigError: the batch does not fit the ranks or the data.
    """

    def __init__(
        self, inputs: TrainingInputs, config: TrainConfig, seed: int, device: torch.device
    ) -> None:
        items, world = len(inputs.train), world_size()
        if config.pairing is Pairing.separate:
            items = len(torch.unique(inputs.train.owner))  # no batch has an image twice
        check_batch_size(config.batch_size, items, world, config.micro_batch_size)
        self.inputs, self.config, self.seed, self.device = inputs, config, seed, device
        self.sampler = GlobalBatchSampler(
            inputs.train.owner, config.batch_size, seed, rank(), world, config.pairing
        )
        self.clock = StepClock(device, config.num_workers, local_world_size())
        self._unreadable: set[str] = set()

    @property
    def steps_an_epoch(self) -> int:
        """Whole batches in a pass over the data."""
        return len(self.sampler)

    def rest_of_epoch(self, step: int) -> Iterator[Inputs]:
        """What is left of the epoch in which `step` steps are done."""
        for batch in self.clock.batches(self._loader(step)):
            self._report_unreadable(batch)
            with self.clock.moving():
                moved = Inputs(
                    images=batch.images.to(self.device, non_blocking=True),
                    tokens=batch.tokens.to(self.device, non_blocking=True),
                    keys=batch.keys.to(self.device, non_blocking=True),
                )
            yield moved
            if sentence := self.clock.sentence():
                log.warning(sentence)

    def _loader(self, step: int) -> DataLoader[Any]:
        epoch, done = divmod(step, len(self.sampler))
        self.sampler.set_position(epoch, done)
        self.inputs.train.set_epoch(epoch)
        return DataLoader(
            self.inputs.train,
            batch_sampler=self.sampler,
            collate_fn=Collate(self.inputs.tokenizer, self.inputs.pad_id),
            num_workers=self.config.num_workers,
            worker_init_fn=plain_signals,
            pin_memory=self.device.type == "cuda",
            # Its own generator: starting a loader must not move the random state of the model.
            generator=torch.Generator().manual_seed(epoch),
        )

    def _report_unreadable(self, batch: Batch) -> None:
        """Say once of each unreadable picture that another one took its place."""
        for path, reason in batch.unreadable:
            if path not in self._unreadable:
                self._unreadable.add(path)
                log.warning("%s cannot be read (%s); another picture takes its place", path, reason)
