"""What a run hands to Weights & Biases: the data that it read and the checkpoint that it made."""

from __future__ import annotations

from pathlib import Path

import pyarrow.parquet as pq

from twotower.checkpoint.atomic import replacing
from twotower.checkpoint.native import file_sha256, read_header
from twotower.data.pairs import PairTable
from twotower.evaluation.report import data_fingerprint
from twotower.wandb_run import WandbRun

MANIFEST = "pairs.parquet"


def publish_data(run: WandbRun, pairs: PairTable, source: str, folder: Path) -> None:
    """Hand over which pictures and captions a run reads, as a manifest; not the pictures.

    `data=manifest data.manifest=wandb:... data.root=<folder of the pictures>` reads it.

    Args:
        source: registered name of the data source; the artifact is called `<source>-<fingerprint>`.
        folder: where the manifest is written.

    Raises:
        ConfigError: the folder cannot be written, or the disk is full.
    """
    path = folder / MANIFEST
    with replacing(path) as temporary:
        pq.write_table(pairs.rows(), temporary)
    fingerprint = data_fingerprint(pairs)
    about = {"root": str(pairs.root), "images": len(pairs), "fingerprint": fingerprint}
    run.artifact(path, f"{source}-{fingerprint}", "dataset", about)


def publish_checkpoint(run: WandbRun, path: Path, name: str) -> None:
    """Hand over a run's best checkpoint with its metrics; `checkpoint=wandb:...` reads it.

    Args:
        name: of the run, and so of the artifact.

    Raises:
        ConfigError: there is no such checkpoint.
    """
    header = read_header(path)
    kept = ("variant", "run", "step", "epoch", "seconds", "metrics")
    about = {key: header[key] for key in kept if key in header}
    run.artifact(path, name, "model", {**about, "sha256": file_sha256(path)}, ("latest", "best"))
