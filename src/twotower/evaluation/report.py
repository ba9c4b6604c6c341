"""`twotower evaluate`: a checkpoint measured on a split, as a table and as JSON."""

from __future__ import annotations

import hashlib
import json
import logging
from pathlib import Path
from typing import Any, NamedTuple

from rich.table import Table

from twotower.checkpoint.atomic import replacing
from twotower.checkpoint.native import read_header
from twotower.config import Config
from twotower.console import print_table, say
from twotower.data.pairs import PairTable, load_pairs
from twotower.distributed import is_main_process, resolve_device
from twotower.evaluation.examined import examined
from twotower.evaluation.features import PairFeatures, PictureInputs
from twotower.evaluation.retrieval import RetrievalReport, measure_pairs
from twotower.evaluation.zeroshot import ZeroShotReport, measure_zeroshot
from twotower.launch import launch
from twotower.metrics import KS
from twotower.models.dual_encoder import ModelBundle
from twotower.models.saved import load_bundle
from twotower.runs import checkpoint_path, logs_path

log = logging.getLogger(__name__)


def with_interval(report: RetrievalReport, name: str) -> str:
    """`62.9 [60.1, 65.8]`: a metric with its 95 % interval."""
    value = f"{report.metrics[name]:.1f}"
    if name not in report.intervals:
        return value
    low, high = report.intervals[name]
    return f"{value} [{low:.1f}, {high:.1f}]"


def report_table(report: RetrievalReport) -> Table:
    """Both directions, a row each."""
    table = Table()
    for heading in ("", *(f"R@{k} %" for k in KS), "median rank"):
        table.add_column(heading, justify="left" if not heading else "right")
    for direction in ("text_to_image", "image_to_text"):
        recalls = [with_interval(report, f"{direction}_R@{k}") for k in KS]
        rank = f"{report.metrics[f'{direction}_median_rank']:g}"
        table.add_row(direction.replace("_to_", " -> "), *recalls, rank)
    return table


def zeroshot_table(report: ZeroShotReport) -> Table:
    """The accuracies, in one row."""
    table = Table("")
    for name in report.metrics:
        heading = name.removeprefix("zeroshot_").replace("top", "top-").replace("_", " ")
        table.add_column(f"{heading} %", justify="right")
    table.add_row("zero-shot", *(f"{value:.1f}" for value in report.metrics.values()))
    return table


def data_fingerprint(pairs: PairTable) -> str:
    """12 hex digits of SHA-256 over the images' file paths and captions, wherever they lie."""
    digest = hashlib.sha256()
    for batch in pairs.table.select(["filepath", "captions"]).to_batches(max_chunksize=10_000):
        for row in batch.to_pylist():
            digest.update(json.dumps([row["filepath"], row["captions"]]).encode() + b"\n")
    return digest.hexdigest()[:12]


class Evaluation(NamedTuple):
    """What `evaluate` measured, None where the data does not allow it, and what it is about."""

    retrieval: RetrievalReport | None
    zeroshot: ZeroShotReport | None
    about: dict[str, Any]


def evaluate_checkpoint(config: Config, checkpoint: Path) -> Evaluation:
    """Measure a checkpoint on this rank's part of the split, and gather; every rank calls it.

    Raises:
        ConfigError: the checkpoint or the split is missing, or a class list does not fit the data.
    """
    device, how = resolve_device(config.distributed), config.evaluate
    of = examined(load_pairs(config.data), how.split, how.max_images, config.zeroshot)
    pairs, prompts = of.pairs, of.prompts
    bundle = load_bundle(checkpoint)
    model, tokenizer = bundle.model.to(device), bundle.tokenizer
    inputs = PictureInputs(pairs, bundle.eval_transform)
    retrieval, zeroshot = None, None
    features: PairFeatures | None = None
    if pairs.has_captions() or prompts is None:
        measured = measure_pairs(
            model, pairs, inputs, tokenizer, how, device, bootstrap=how.bootstrap
        )
        retrieval, features = measured
    if prompts is not None:
        zeroshot = measure_zeroshot(
            model, pairs, inputs, tokenizer, prompts, how, device, features=features
        )
    last = checkpoint.with_name("last.safetensors")
    seconds = read_header(last if last.is_file() else checkpoint).get("seconds", 0.0)
    about = describe(bundle, checkpoint, config, float(seconds), pairs)
    return Evaluation(retrieval, zeroshot, about)


def describe(
    bundle: ModelBundle,
    checkpoint: Path,
    config: Config,
    train_seconds: float,
    pairs: PairTable,
) -> dict[str, Any]:
    """What a report is about: variant, parameters, seconds of training, the measured `pairs`."""
    return {
        "checkpoint": str(checkpoint),
        "variant": bundle.config.registered_name,
        "parameters": sum(p.numel() for p in bundle.model.parameters()),
        "train_seconds": train_seconds,
        "data": config.data.registered_name,
        "split": config.evaluate.split or "all",
        "max_images": config.evaluate.max_images,
        "data_fingerprint": data_fingerprint(pairs),
    }


def report_path(logs: Path, config: Config) -> Path:
    """Where the report of a run goes: `<logs>/evaluate/<data>-<split>.json`."""
    first = f"-{config.evaluate.max_images}" if config.evaluate.max_images else ""
    split = config.evaluate.split or "all"
    return logs / "evaluate" / f"{config.data.registered_name}-{split}{first}.json"


def write_report(
    path: Path,
    report: RetrievalReport | None,
    zeroshot: ZeroShotReport | None = None,
    **about: Any,
) -> None:
    """Write reports and what they are about as JSON, whole or not at all.

    Raises:
        ConfigError: the folder cannot be written, or the disk is full.
    """
    found = dict(about)
    if report is not None:
        found |= report.to_json()
    if zeroshot is not None:
        found["zeroshot"] = zeroshot.to_json()
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")


def evaluate(config: Config) -> None:
    """Measure, print tables, write `logs/<run>/evaluate/<data>-<split>.json`.

    Raises:
        ConfigError: as `evaluate_checkpoint`.
    """
    checkpoint = checkpoint_path(config)
    measured = launch(evaluate_checkpoint, config.distributed, config, checkpoint)
    if not is_main_process():
        return
    retrieval, zeroshot, about = measured
    path = report_path(logs_path(config), config)
    write_report(path, retrieval, zeroshot, **about)
    where = f"{checkpoint} on {about['data']}/{about['split']}"
    if retrieval is not None:
        say(
            f"{where}: {retrieval.images} images, {retrieval.captions} captions; "
            "brackets: 95 % bootstrap intervals over images"
        )
        print_table(report_table(retrieval))
    if zeroshot is not None:
        say(f"{where}: {zeroshot.about()}" if retrieval is None else zeroshot.about())
        print_table(zeroshot_table(zeroshot))
    log.info("written to %s", path)
