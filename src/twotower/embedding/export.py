"""Encoding a source into a store on one or many processes, whose number changes no byte."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path

from twotower.checkpoint.native import file_sha256
from twotower.config import DistributedConfig
from twotower.data.pairs import PairTable
from twotower.distributed import is_launched_main, resolve_device
from twotower.embedding.claims import Claims
from twotower.embedding.fingerprint import differences
from twotower.embedding.folders import beside, restore
from twotower.embedding.layout import MANIFEST, Manifest
from twotower.embedding.rows import fingerprint, has_captions
from twotower.embedding.update import update
from twotower.embedding.work import ExportJob, ExportResult, run_export
from twotower.encode_config import EncodeConfig, Rows
from twotower.launch import launch
from twotower.settings import ConfigError


def existing_checkpoint(path: Path) -> Path:
    """The path, if there is a file.

    Raises:
        ConfigError: there is none.
    """
    if not path.is_file():
        raise ConfigError(
            f"no checkpoint at {path}; train one first with `twotower train ...` and the same "
            "model=, data= and train settings, or give checkpoint=..."
        )
    return path


def export(
    checkpoint: Path,
    pairs: PairTable,
    output: Path,
    encode: EncodeConfig,
    distributed: DistributedConfig,
) -> ExportResult | None:
    """Encode the images and captions of `pairs` into the store `output`.

    A finished store of the same source, checkpoint and settings is reused, an unfinished one is
    continued with the number of threads that it was begun with, another one is refused. Several
    exports of the same, on machines that share the folder, help each other; an export of another
    kind (an update, an encoding anew) waits until they are done. With `encode.num_shards` one does
    only its own part of the shards, and the last one finishes. With `encode.update` a finished
    store of this checkpoint is brought to what the source is now. With `encode.overwrite` the store
    that is there stays until the new one is finished. Unreadable pictures are listed in the store.

    Returns:
        What was done; None on other ranks than the first under torchrun.

    Raises:
        ConfigError: the checkpoint is missing, the folder holds something else, there is nothing to
            encode, nothing could be read, or the disk is full.
    """
    job = ExportJob(
        checkpoint=checkpoint,
        pairs=pairs,
        output=output,
        folder=output,
        plan=_plan(existing_checkpoint(checkpoint), pairs, encode, distributed),
        encode=encode,
        distributed=distributed,
    )
    restore(output)
    result = update(job) if encode.update and is_finished(output) else _export(job)
    return result if is_launched_main() else None


def _export(job: ExportJob) -> ExportResult | None:
    overwrite = job.encode.overwrite
    if _work_folder(job.output, job.plan, overwrite=overwrite) is None:  # without writing anything
        return ExportResult(folder=job.output, manifest=Manifest.read(job.output), reused=True)
    with Claims(job.output) as claims, claims.working(job.plan.job(str(overwrite))):
        # Others may have written here until now.
        folder = _work_folder(job.output, job.plan, overwrite=overwrite)
        if folder is None:
            return ExportResult(folder=job.output, manifest=Manifest.read(job.output), reused=True)
        return launch(run_export, job.distributed, dataclasses.replace(job, folder=folder))


def _plan(
    checkpoint: Path, pairs: PairTable, encode: EncodeConfig, distributed: DistributedConfig
) -> Manifest:
    """The manifest as far as it is known before the model is loaded."""
    texts = encode.texts and has_captions(pairs)
    if not encode.images and not texts:
        why = "it has no captions" if encode.texts else "encode.texts is false too"
        raise ConfigError(f"nothing to encode of {pairs.name}: encode.images is false and {why}")
    if encode.rows is Rows.pairs and not has_captions(pairs):
        raise ConfigError(
            f"encode.rows=pairs makes a row of each caption, and {pairs.name} has none; use "
            "encode.rows=images"
        )
    return Manifest(
        source_rows=len(pairs),
        dtype=encode.dtype.name,
        rows_kind=encode.rows.name,
        images=encode.images,
        texts=texts,
        columns=encode.metadata,
        shard_rows=encode.shard_rows,
        batch_size=encode.known_batch_size,
        precision=encode.precision.name,
        compiled=encode.compile,
        device=resolve_device(distributed).type,
        checkpoint=os.path.abspath(checkpoint),
        checkpoint_sha256=file_sha256(checkpoint),
        source=pairs.name,
        source_fingerprint=fingerprint(pairs),
    )


def is_finished(output: Path) -> bool:
    """Whether a folder holds a store that is not in the making."""
    return (output / MANIFEST).exists() and Manifest.read(output).complete


def _work_folder(output: Path, plan: Manifest, *, overwrite: bool) -> Path | None:
    """Where to write: `output`, beside it to replace a store, None if it is there already."""
    if not (output / MANIFEST).exists():
        _refuse_other_files(output)
        return output
    there = Manifest.read(output)
    if there.updates and not there.is_whole(output) and not overwrite:
        raise ConfigError(
            f"the store {output} was updated and has lost files since; encode it anew with "
            "encode.overwrite=true"
        )
    is_whole = there.complete and there.is_whole(output)
    different = differences(there, plan, device=not is_whole)
    if not different and not is_whole:
        return output
    if overwrite:
        _refuse_what_is_in_the_way(beside(output, "old"))
        new = beside(output, "new")
        if not (new / MANIFEST).exists():
            _refuse_other_files(new)
        return new
    if different:
        state = "finished" if there.complete else "unfinished"
        raise ConfigError(
            f"{output} holds another encoding ({state}): {'; '.join(different)}; choose another "
            "folder with encode.output=..., or replace it with encode.overwrite=true"
        )
    return None


def _refuse_what_is_in_the_way(old: Path) -> None:
    """What is not the store's own stays in `<store>.old`, and would fail the next replacement."""
    if old.is_dir() and not (old / MANIFEST).exists() and (files := sorted(old.iterdir())):
        raise ConfigError(
            f"{old} holds {files[0].name}, which an earlier encoding left there because it was not "
            "its own; move it away, for the store that is replaced goes there for a moment"
        )


def _refuse_other_files(folder: Path) -> None:
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"{folder} is a file; give a folder for the store with encode.output=...")
    if folder.is_dir() and any(not path.name.startswith(".") for path in folder.iterdir()):
        raise ConfigError(
            f"{folder} is not empty and holds no embedding store; choose another folder with "
            "encode.output=..."
        )
