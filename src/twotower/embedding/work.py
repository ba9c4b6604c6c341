"""One rank's part of an export, from loading the model to the finished manifest."""

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

import torch

from twotower.config import DistributedConfig
from twotower.data.pairs import PairTable
from twotower.distributed import (
    Stopped,
    is_main_process,
    local_world_size,
    num_threads,
    on_main,
    resolve_device,
    world_size,
)
from twotower.embedding.batch_size import find_batch_size
from twotower.embedding.claims import Claims
from twotower.embedding.encoder import Encoder
from twotower.embedding.fingerprint import check_fingerprint
from twotower.embedding.folders import replace_store
from twotower.embedding.layout import MANIFEST, Manifest
from twotower.embedding.shards import ShardEncoder
from twotower.embedding.writer import StoreWriter
from twotower.encode_config import EncodeConfig
from twotower.settings import ConfigError

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class ExportResult:
    """What an export did.

    Attributes:
        folder: the store; manifest: what it holds.
        reused: it was there already, and nothing was done.
        encoded: images of the source that this run worked on; the rest was kept from an earlier
            run.
        seconds: time of that work over all processes, without loading the model.
        update: what an update has found, in words.
    """

    folder: Path
    manifest: Manifest
    reused: bool = False
    encoded: int = 0
    seconds: float = 0.0
    update: str = ""

    def sentence(self) -> str:
        """The result in words."""
        done = self.manifest
        if not done.complete:
            return (
                f"encoded {self.encoded:,} images in {self.seconds:,.1f} s; other shards of the "
                f"store {self.folder} are still missing: run the other jobs (encode.shard=0 to "
                "encode.num_shards - 1), or any of them again"
            )
        errors = f", {done.errors:,} unreadable (errors.parquet)" if done.errors else ""
        what = f"{done.rows:,} rows of {done.dim} ({done.dtype}){errors}"
        if self.reused:
            return (
                f"kept the store {self.folder}: {what}; it holds this source and checkpoint "
                "already (encode.overwrite=true encodes anew)"
            )
        if self.update:
            return (
                f"found {self.update} images and encoded {self.encoded:,} in {self.seconds:,.1f} s;"
                f" the store {self.folder} has {what}"
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
    replaced. `part`: what is written goes into another store and is removed then.
    """

    checkpoint: Path
    pairs: PairTable
    output: Path
    folder: Path
    plan: Manifest
    encode: EncodeConfig
    distributed: DistributedConfig
    part: bool = False


def run_export(job: ExportJob) -> ExportResult | None:
    """One rank's part: shards that nobody works on, one after the other; then the manifest.

    Any number of ranks and of other encoders, on any machine that shares the folder, work on one
    store at the same time.

    Raises:
        ConfigError: as for `export`.
        Stopped: by Ctrl-C or SIGTERM.
    """
    device, precision = resolve_device(job.distributed), job.encode.precision
    encoder = Encoder.load(job.checkpoint, device, precision, compiled=job.encode.compile)
    writer, missing = on_main(_begin, job, encoder)
    plan = writer.plan
    encoder.batch_size = plan.batch_size
    if plan.source_fingerprint != job.plan.source_fingerprint:
        raise ConfigError("the source has changed since the first process looked; run this again")
    started = time.monotonic()
    with _stopping_at_once(), num_threads(plan.threads), Claims(job.folder) as claims:
        clock = ShardEncoder(encoder, job.pairs, job.encode, writer).run(claims, missing)
        if not is_main_process():
            return None
        if sentence := clock.sentence(job.encode.num_workers, local_world_size()):
            log.info("%s", sentence)
        seconds = time.monotonic() - started
        manifest = _finish(job, writer, claims)
    encoded = sum(len(plan.shard_range(shard)) for shard in missing)
    return ExportResult(folder=job.output, manifest=manifest, encoded=encoded, seconds=seconds)


def _finish(job: ExportJob, writer: StoreWriter, claims: Claims) -> Manifest:
    """Write the manifest and replace an older store, unless another encoder has done so.

    Where shards of other jobs (`encode.num_shards`) are missing, the manifest stays that of a
    store in the making.
    """
    with claims.holding("finish"):
        if not writer.is_over():
            if not all(writer.is_recorded(shard) for shard in range(writer.plan.num_shards)):
                return Manifest.read(job.folder)
            writer.finish()
        if job.folder != job.output and (job.folder / MANIFEST).exists():
            replace_store(job.output)
        claims.clear()
        if job.part and not (job.output / MANIFEST).exists():  # another has used and removed it
            return dataclasses.replace(job.plan, complete=True)
        return Manifest.read(job.output)


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


def _batch_size_of(folder: Path) -> int:
    """The batch size with which a store was begun; 0 if there is none."""
    return Manifest.read(folder).batch_size if (folder / MANIFEST).exists() else 0


def _begin(job: ExportJob, encoder: Encoder) -> tuple[StoreWriter, list[int]]:
    """The store in the making and the shards that this job is to do; says what is kept."""
    wanted = dataclasses.replace(job.plan, **encoder.description(), threads=torch.get_num_threads())
    with Claims(job.folder) as claims, claims.holding("begin"):
        if not wanted.batch_size:
            size = _batch_size_of(job.folder) or find_batch_size(encoder, images=wanted.images)
            wanted = dataclasses.replace(wanted, batch_size=size)
        if job.part:
            # The same checkpoint, but another version of the code may prepare its inputs otherwise.
            check_fingerprint(job.plan, "the store to update", wanted, "what would be added to it")
        anew = job.part or job.folder != job.output
        writer = StoreWriter.begin(job.folder, wanted, anew=anew, may_be_empty=job.part)
        plan, missing = writer.plan, writer.missing()
    done = plan.num_shards - len(missing)
    if 0 < done < plan.num_shards:
        log.info("continuing %s: %d of %d shards are done", job.folder, done, plan.num_shards)
    if job.distributed.num_threads not in (0, plan.threads):
        log.warning("keeping %d thread(s) a process, with which the store was begun", plan.threads)
    missing = [s for s in missing if s % job.encode.num_shards == job.encode.shard]
    if 0 < len(missing) < world_size():
        log.warning(
            "%d shards for %d processes, so some have nothing to do; encode.shard_rows=%d gives "
            "work to each",
            len(missing),
            world_size(),
            -(-plan.source_rows // world_size()),
        )
    return writer, missing
