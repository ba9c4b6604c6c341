"""One rank's part of an export: its range of shards, encoded and committed one after the other."""

from __future__ import annotations

import dataclasses
import logging
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

import numpy as np
import torch

from twotower.config import DistributedConfig
from twotower.console import ProgressLine, progress
from twotower.data.pairs import PairTable
from twotower.distributed import (
    Stopped,
    is_main_process,
    on_main,
    rank,
    resolve_device,
    shard_range,
    world_size,
)
from twotower.embedding.encoder import Encoder
from twotower.embedding.layout import FloatRows, Manifest
from twotower.embedding.pictures import PictureBatch, batches_of, picture_batches
from twotower.embedding.rows import RowGrid, Slots
from twotower.embedding.writer import InputError, StoreWriter, replace_store
from twotower.encode_config import EncodeConfig

log = logging.getLogger(__name__)

SECONDS_BETWEEN_LOOKS = 0.2


@dataclass(frozen=True, kw_only=True)
class ExportResult:
    """What an export did.

    Attributes:
        folder: the store; manifest: what it holds.
        reused: it was there already, and nothing was done.
        encoded: images of the source that this run worked on; the rest was kept from an earlier
            run.
        seconds: time of that work over all processes, without loading the model.
    """

    folder: Path
    manifest: Manifest
    reused: bool = False
    encoded: int = 0
    seconds: float = 0.0

    def sentence(self) -> str:
        """The result in words."""
        done = self.manifest
        errors = f", {done.errors:,} unreadable (errors.parquet)" if done.errors else ""
        what = f"{done.rows:,} rows of {done.dim} ({done.dtype}){errors}"
        if self.reused:
            return (
                f"kept the store {self.folder}: {what}; it holds this source and checkpoint "
                "already (encode.overwrite=true encodes anew)"
            )
        kept = done.source_rows - self.encoded
        rate = self.encoded / max(self.seconds, 1e-9)
        resumed = f"; {kept:,} images were done before" if kept else ""
        return (
            f"encoded {what} in {self.seconds:,.1f} s, {rate:,.1f} images/s{resumed}; "
            f"the store is {self.folder}"
        )


@dataclass(frozen=True, kw_only=True)
class ExportJob:
    """Everything that a rank needs, finished before the ranks start.

    `folder` is where the shards are written: `output`, or `<output>.new` while an older store is
    replaced.
    """

    checkpoint: Path
    pairs: PairTable
    output: Path
    folder: Path
    plan: Manifest
    encode: EncodeConfig
    distributed: DistributedConfig


def run_export(job: ExportJob) -> ExportResult | None:
    """One rank's part: a range of the missing shards; the first rank begins and finishes.

    Raises:
        ConfigError: as for `export`.
        Stopped: by Ctrl-C or SIGTERM.
    """
    encoder = Encoder.load(
        job.checkpoint, resolve_device(job.distributed), job.encode.precision, job.encode.batch_size
    )
    writer, missing = on_main(_begin, job, encoder)
    plan = writer.plan
    started = time.monotonic()
    mine = [missing[place] for place in shard_range(len(missing), rank(), world_size())]
    with _stopping_at_once(), _num_threads(plan.threads):
        _encode_shards(job, encoder, writer, mine)
        if not is_main_process():
            return None
        # Not a barrier: a collective has a time limit, and another rank's last shard may take
        # longer than that. A rank that dies ends this one too.
        while not all(writer.is_recorded(shard) for shard in missing):
            time.sleep(SECONDS_BETWEEN_LOOKS)
        seconds = time.monotonic() - started
        manifest = writer.finish()
        if job.folder != job.output:
            replace_store(job.output)
    encoded = sum(len(plan.shard_range(shard)) for shard in missing)
    return ExportResult(folder=job.output, manifest=manifest, encoded=encoded, seconds=seconds)


@contextmanager
def _stopping_at_once() -> Iterator[None]:
    """Within it, Ctrl-C and SIGTERM raise `Stopped`: whole shards are saved, so nothing waits.

    Only the first signal counts: a launcher sends more of them while the ranks clean up.
    """
    numbers = (signal.SIGINT, signal.SIGTERM)

    def stop(number: int, frame: FrameType | None) -> None:
        for each in numbers:
            signal.signal(each, signal.SIG_IGN)
        raise Stopped(number, "every finished shard is kept")

    if threading.current_thread() is not threading.main_thread():
        # Python hands signals to the main thread alone.
        yield
        return
    before = {number: signal.signal(number, stop) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def _num_threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _begin(job: ExportJob, encoder: Encoder) -> tuple[StoreWriter, list[int]]:
    """The store in the making and the shards that it lacks; says what is kept."""
    wanted = dataclasses.replace(
        job.plan,
        dim=encoder.dim,
        text_length=encoder.text_length,
        model=encoder.bundle.config.registered_name,
        threads=torch.get_num_threads(),
    )
    writer = StoreWriter.begin(job.folder, wanted)
    plan, missing = writer.plan, writer.missing()
    done = plan.num_shards - len(missing)
    if done:
        log.info("continuing %s: %d of %d shards are done", job.folder, done, plan.num_shards)
    if job.distributed.num_threads not in (0, plan.threads):
        log.warning("keeping %d thread(s) a process, with which the store was begun", plan.threads)
    if 0 < len(missing) < world_size():
        log.warning(
            "%d shards for %d processes, so some have nothing to do; encode.shard_rows=%d gives "
            "work to each",
            len(missing),
            world_size(),
            -(-plan.source_rows // world_size()),
        )
    return writer, missing


def _encode_shards(
    job: ExportJob, encoder: Encoder, writer: StoreWriter, shards: list[int]
) -> None:
    """Encode and commit these shards, in order."""
    plan = writer.plan
    grid = RowGrid(job.pairs, job.encode.rows)
    ranges = [plan.shard_range(shard) for shard in shards]
    batches = picture_batches(
        job.pairs,
        encoder.bundle.eval_transform,
        ranges if plan.images else [],
        plan.batch_size,
        num_workers=job.encode.num_workers,
        pin_memory=plan.device == "cuda",
    )
    share = f" (process {rank() + 1} of {world_size()})" if world_size() > 1 else ""
    total = sum(len(rows) for rows in ranges)
    with progress(f"encoding{share}", total, "images", show=is_main_process()) as line:
        for shard, rows in zip(shards, ranges, strict=True):
            slots = grid.slots(rows)
            images: FloatRows | None = None
            reasons: dict[int, str] = {}
            if plan.images:
                images, reasons = _image_rows(encoder, batches, rows, plan, line)
            texts = _text_rows(encoder, slots, plan) if plan.texts else None
            if not plan.images:
                line.advance(len(rows))
            unreadable = np.array(sorted(reasons), np.int64)
            keep = ~np.isin(slots.source_rows, unreadable)
            writer.commit(
                shard,
                None if images is None else images[slots.source_rows[keep] - rows.start],
                None if texts is None else texts[keep],
                grid.metadata(slots, keep),
                [
                    InputError(row, str(job.pairs.path(row)), reasons[row])
                    for row in sorted(reasons)
                ],
            )


def _image_rows(
    encoder: Encoder,
    batches: Iterator[PictureBatch],
    rows: range,
    plan: Manifest,
    line: ProgressLine,
) -> tuple[FloatRows, dict[int, str]]:
    """The vectors (n, D) of a shard's pictures, and why a source row has none."""
    vectors: FloatRows = np.zeros((len(rows), plan.dim), plan.numpy_dtype)
    reasons: dict[int, str] = {}
    for places in batches_of(rows, plan.batch_size):
        batch = next(batches)
        if batch.pixels is not None:
            first = places.start - rows.start
            vectors[first : first + len(places)] = encoder.encode_batch(batch)
        reasons.update({places[place]: reason for place, reason in batch.reasons.items()})
        line.advance(len(places))
    return vectors, reasons


def _text_rows(encoder: Encoder, slots: Slots, plan: Manifest) -> FloatRows:
    """The vectors (n, D) of a shard's captions, also of unreadable pictures: no place shifts."""
    vectors: FloatRows = np.zeros((len(slots.captions), plan.dim), plan.numpy_dtype)
    for places in batches_of(range(len(slots.captions)), plan.batch_size):
        features = encoder.encode_texts(slots.captions[places.start : places.stop])
        vectors[places.start : places.stop] = features
    return vectors
