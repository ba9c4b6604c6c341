"""Encoding shards: one process claims what nobody works on, encodes it and commits it."""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Iterator, Sequence
from itertools import chain

import numpy as np

from twotower.console import ProgressLine, progress
from twotower.data.pairs import PairTable
from twotower.distributed import is_main_process, rank, shard_range, world_size
from twotower.embedding.claims import SECONDS_BETWEEN_LOOKS, Claims
from twotower.embedding.clock import InputClock
from twotower.embedding.encoder import Encoder
from twotower.embedding.layout import FloatArray, FloatRows
from twotower.embedding.pictures import (
    FileState,
    PictureBatch,
    batches_of,
    picture_batches,
)
from twotower.embedding.rows import RowGrid, Slots
from twotower.embedding.writer import InputError, ShardRows, StoreWriter
from twotower.encode_config import EncodeConfig

log = logging.getLogger(__name__)

# Many processes that find nothing to claim ask a shared disk for records, each for itself.
LONGEST_BETWEEN_LOOKS = 5.0


class ShardQueue:
    """The shards of a list that this process gets: claimed one by one, when they are asked for.

    `claimed` holds those that are asked for and not committed yet, in order. Iterating again tries
    again what others had claimed.
    """

    def __init__(self, writer: StoreWriter, claims: Claims, shards: Sequence[int]) -> None:
        self._writer = writer
        self._claims = claims
        self._left = list(shards)
        self.claimed: deque[int] = deque()

    def __iter__(self) -> Iterator[range]:
        for shard in self.left():
            if self._writer.is_recorded(shard) or not self._claims.take(str(shard)):
                continue
            # It may have been finished and released between the two.
            if self._writer.is_recorded(shard) or self._writer.is_over():
                self._claims.release(str(shard))
                continue
            self.claimed.append(shard)
            yield self._writer.plan.shard_range(shard)

    def left(self) -> list[int]:
        """The shards that nobody has finished yet."""
        if self._writer.is_over():
            self._left = []
        recorded = self._writer.recorded()
        self._left = [shard for shard in self._left if shard not in recorded]
        return self._left

    def done(self, shard: int) -> None:
        """Give a committed shard back."""
        self._claims.release(str(shard))


class ShardEncoder:
    """Encodes the shards of a store in the making, with whoever else works on it."""

    def __init__(
        self, encoder: Encoder, pairs: PairTable, config: EncodeConfig, writer: StoreWriter
    ) -> None:
        self._encoder = encoder
        self._pairs = pairs
        self._config = config
        self._writer = writer
        self._grid = RowGrid(pairs, config.rows)
        self._clock = InputClock()

    def run(self, claims: Claims, shards: Sequence[int]) -> InputClock:
        """Encode these shards, but for what other processes do; returns when all are done.

        What a dead process had claimed is taken over. What comes back knows where the time went.
        """
        # Each rank begins at another place, so that neighbours do not ask for the same claims.
        start = shard_range(len(shards), rank(), world_size()).start
        queue = ShardQueue(self._writer, claims, [*shards[start:], *shards[:start]])
        ranges = {shard: len(self._writer.plan.shard_range(shard)) for shard in shards}
        told, pause = False, SECONDS_BETWEEN_LOOKS
        with progress("encoding", sum(ranges.values()), "images", show=is_main_process()) as line:
            others = _Others(line, ranges)
            while left := queue.left():
                before = len(others.mine)
                self._encode_claimed(queue, line, others)
                others.look(queue)
                if len(others.mine) > before:
                    continue
                if not told and (owner := claims.owner(str(left[0]))):
                    log.info("waiting for %d shards, shard %d of %s", len(left), left[0], owner)
                    told = True
                time.sleep(pause)
                pause = min(2 * pause, LONGEST_BETWEEN_LOOKS)
        return self._clock

    def _encode_claimed(self, queue: ShardQueue, line: ProgressLine, others: _Others) -> None:
        """Encode and commit every shard that can be claimed now."""
        plan = self._writer.plan
        if not plan.images:
            for rows in queue:
                others.mine.add(queue.claimed[0])
                self._commit(queue, None, {}, [])
                line.advance(len(rows))
            return
        ranges = iter(queue)
        if (first_rows := next(ranges, None)) is None:  # no loader, whose workers take time
            return
        loader = picture_batches(
            self._pairs,
            self._encoder.bundle.eval_transform,
            chain([first_rows], ranges),
            plan.batch_size,
            num_workers=self._config.num_workers,
            pin_memory=plan.device == "cuda",
        )
        batches = self._encoder.encode_batches(self._clock.waiting(loader))
        for first in batches:
            others.mine.add(queue.claimed[0])
            rows = plan.shard_range(queue.claimed[0])
            images, reasons, files = self._image_rows(chain([first], batches), rows, line)
            self._commit(queue, images, reasons, files)
            others.look(queue)

    def _commit(
        self,
        queue: ShardQueue,
        images: FloatRows | None,
        reasons: dict[int, str],
        files: list[FileState],
    ) -> None:
        """Write the oldest claimed shard; its pictures' vectors stand in the places of its rows."""
        plan, shard = self._writer.plan, queue.claimed[0]
        rows = plan.shard_range(shard)
        slots = self._grid.slots(rows)
        texts = self._text_rows(slots) if plan.texts else None
        keep = ~np.isin(slots.source_rows, np.array(sorted(reasons), np.int64))
        errors = [
            InputError(row, str(self._pairs.path(row)), reasons[row]) for row in sorted(reasons)
        ]
        found = ShardRows(
            images=None if images is None else images[slots.source_rows[keep] - rows.start],
            texts=None if texts is None else texts[keep],
            metadata=self._grid.metadata(slots, keep, extra=plan.columns),
            states=self._grid.states(rows, files, reasons),
            errors=errors,
        )
        self._writer.commit(shard, found)
        queue.claimed.popleft()
        queue.done(shard)

    def _image_rows(
        self, batches: Iterator[tuple[PictureBatch, FloatArray]], rows: range, line: ProgressLine
    ) -> tuple[FloatRows, dict[int, str], list[FileState]]:
        """The vectors (n, D) of a shard's pictures, why a source row has none, and the files."""
        plan = self._writer.plan
        vectors: FloatRows = np.zeros((len(rows), plan.dim), plan.numpy_dtype)
        reasons: dict[int, str] = {}
        files: list[FileState] = []
        for places in batches_of(rows, plan.batch_size):
            batch, features = next(batches)
            first = places.start - rows.start
            vectors[first : first + len(places)] = features
            reasons.update({places[place]: reason for place, reason in batch.reasons.items()})
            files += batch.states
            line.advance(len(places), self._clock.note())
        return vectors, reasons, files

    def _text_rows(self, slots: Slots) -> FloatRows:
        """The vectors (n, D) of a shard's captions, also of unreadable pictures: none shifts."""
        plan = self._writer.plan
        vectors: FloatRows = np.zeros((len(slots.captions), plan.dim), plan.numpy_dtype)
        first = 0
        for features in self._encoder.iterate_texts(slots.captions):
            vectors[first : first + len(features)] = features
            first += len(features)
        return vectors


class _Others:
    """Counts what other processes finish, so that rate and estimate are those of the whole."""

    def __init__(self, line: ProgressLine, rows: dict[int, int]) -> None:
        self.mine: set[int] = set()
        self._line = line
        self._rows = rows

    def look(self, queue: ShardQueue) -> None:
        left = {*queue.left(), *queue.claimed}
        for shard in [shard for shard in self._rows if shard not in left]:
            count = self._rows.pop(shard)
            if shard not in self.mine:
                self._line.advance(count)
