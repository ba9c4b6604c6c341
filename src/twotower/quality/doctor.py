"""`twotower doctor`: what is wrong with a data set, told in a report, a page and a manifest."""

from __future__ import annotations

import dataclasses
import json
import logging
import re
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from twotower.checkpoint.atomic import replacing
from twotower.config import Config, DataConfig
from twotower.data.manifest import ManifestConfig
from twotower.data.pairs import PairTable
from twotower.distributed import resolve_device
from twotower.doctor_config import COPIES, EMBEDDED, MEANINGS, DoctorConfig
from twotower.embedding.encoder import Encoder
from twotower.embedding.export import existing_checkpoint
from twotower.models.openai_tokenizer import OpenAITokenizer
from twotower.quality import findings as found_in
from twotower.quality.captions import CaptionFacts, examine_captions, find_left_out
from twotower.quality.classes import balance
from twotower.quality.cleaned import PROPOSED, propose_split, write_cleaned
from twotower.quality.embedded import near_by_embedding
from twotower.quality.groups import find_copies
from twotower.quality.page import Page, verdict
from twotower.quality.picture import Limits
from twotower.quality.scan import has_picture, scan
from twotower.runs import checkpoint_path

log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Diagnosis:
    """What the doctor found.

    Attributes:
        findings: a row an image and finding (`findings.SCHEMA`). group: (N,), the first row of the
            group of copies that an image is in. removed: (N,), what the cleaned manifest leaves
            out. summary: counts and settings, as JSON can hold them.
    """

    findings: pa.Table
    group: npt.NDArray[np.int64]
    removed: npt.NDArray[np.bool_]
    summary: dict[str, Any]


def output_folder(config: Config, pairs: PairTable) -> Path:
    """Where the report goes: `doctor.output`, or a folder of the data's name under the logs."""
    if config.doctor.output:
        return Path(config.doctor.output)
    names = [pairs.root.absolute().name, Path(pairs.name).name.split(".")[0]]
    parts = [re.sub(r"[^\w.-]+", "_", name).strip("_.") for name in names]
    name = "-".join(part for part in dict.fromkeys(parts) if part)
    return Path(config.run.logs_dir) / "doctor" / (name or "data")


def examine(config: Config, pairs: PairTable, folder: Path, path: str | None = None) -> Diagnosis:
    """Look at every image and caption of a source; only `folder` is written to.

    Args:
        path: what `path=` names, where that is the source instead of the data section.

    Raises:
        ConfigError: the checkpoint is missing, or the folder cannot be written.
    """
    doctor, device = config.doctor, resolve_device(config.distributed)
    encoder = _encoder(config)
    tokenizer = OpenAITokenizer() if encoder is None else encoder.bundle.tokenizer
    left_out = find_left_out(_source(config, path), pairs, doctor.max_shown)
    captions = examine_captions(pairs, tokenizer, left_out)
    limits = Limits(doctor.max_pixels, doctor.min_side)
    found = scan(pairs, limits, doctor.num_workers, folder / "scan.parquet")
    findings = pa.concat_tables([found_in.of_pictures(found), found_in.of_captions(captions)])
    # What is left out for itself cannot be the one of a group that stays.
    usable = has_picture(found) & ~found_in.rows_with(findings, doctor.remove, len(pairs))
    splits = pairs.table["split"].to_pylist()
    log.info("looking for duplicates among %d images", int(usable.sum()))
    grouped = find_copies(found, usable, splits, doctor.near_similarity, device)
    findings = pa.concat_tables([findings, found_in.of_copies(grouped)])
    if encoder is not None:
        # One of each group; and all blank pictures are alike.
        rows = usable & ~found_in.rows_with(findings, (*COPIES, "blank"), len(pairs))
        least = doctor.embedding_similarity
        near = near_by_embedding(encoder, pairs, np.flatnonzero(rows), least)
        findings = pa.concat_tables([findings, found_in.of_embeddings(EMBEDDED, *near)])
    removed = found_in.rows_with(findings, doctor.remove, len(pairs))
    summary = _summary(config, pairs, findings, removed, captions)
    summary["groups_of_copies"] = int((np.bincount(grouped.group) > 1).sum())
    return Diagnosis(findings, grouped.group, removed, summary)


def _source(config: Config, path: str | None) -> DataConfig:
    """The data section that gives what `path` names: it may be a table."""
    if path is None:
        return config.data
    return ManifestConfig(manifest=path) if Path(path).is_file() else DataConfig()


def _encoder(config: Config) -> Encoder | None:
    if not config.checkpoint:
        return None
    device = resolve_device(config.distributed)
    return Encoder.load(existing_checkpoint(checkpoint_path(config)), device)


def _summary(
    config: Config,
    pairs: PairTable,
    findings: pa.Table,
    removed: npt.NDArray[np.bool_],
    captions: CaptionFacts,
) -> dict[str, Any]:
    splits = np.array(pairs.table["split"].to_pylist(), object)
    classes = pairs.classes()
    facts = {
        "data": pairs.name,
        "images": len(pairs),
        "images_kept": int((~removed).sum()),
        "findings": found_in.counts(findings),
        "removed_for": list(config.doctor.remove),
        "splits": {
            split: {
                "images": int((splits == split).sum()),
                "kept": int((~removed & (splits == split)).sum()),
            }
            for split in dict.fromkeys(splits.tolist())
        },
        "captions": {
            "captions": captions.captions,
            "left_out": captions.left_out.number,
            "left_out_first": list(captions.left_out.first),
            "too_long": captions.too_long,
            "length": captions.length,
            "tokenizer": "the checkpoint's" if config.checkpoint else "OpenAI's, by default",
            "longest": captions.longest,
            "images_without": len(captions.without),
        },
        "seed": config.seed,
    }
    if classes is not None:
        facts["classes"] = balance(classes, splits.tolist())
    return facts


def write(config: Config, pairs: PairTable, diagnosis: Diagnosis, folder: Path) -> dict[str, Any]:
    """Write report, cleaned manifest, page and summary into a folder; the summary as written.

    Raises:
        ConfigError: the folder cannot be written.
    """
    doctor: DoctorConfig = config.doctor
    manifest = folder / f"cleaned.{doctor.manifest_format.name}"
    stays = ~diagnosis.removed
    use = f"data=manifest data.manifest={manifest}" if stays.any() else ""
    if use and not pairs.has_captions():
        use += " data.caption_column="
    files = {"report.parquet": "a row an image and finding"}
    if stays.any():
        files[manifest.name] = (
            f"what stays; {PROPOSED} keeps groups of copies together (data.split_column={PROPOSED})"
        )
    files |= {
        "summary.json": "the counts",
        "scan.parquet": "what each file is, so that a second look reads changed files only",
    }
    summary = {**diagnosis.summary, "files": files, "use": use}
    table = found_in.report(diagnosis.findings, pairs, diagnosis.group, doctor.remove)
    with replacing(folder / "report.parquet") as temporary:
        pq.write_table(table, temporary)
    ids = pairs.table["image_id"].to_pylist()
    if stays.any():
        rows = np.flatnonzero(stays)
        proposed = np.full(len(pairs), "", object)
        proposed[rows] = propose_split(
            [ids[row] for row in rows], diagnosis.group[rows], doctor.val_fraction, config.seed
        )
        write_cleaned(manifest, pairs, stays, proposed)
    else:
        manifest.unlink(missing_ok=True)  # of an earlier look
    with replacing(folder / "summary.json") as temporary:
        text = json.dumps(summary, indent=2, ensure_ascii=False)
        temporary.write_text(text + "\n", encoding="utf-8")
    page = Page(pairs, diagnosis.findings, summary, doctor.max_shown)
    with replacing(folder / "report.html") as temporary:
        temporary.write_text(page.html(), encoding="utf-8")
    return summary


def lines(summary: dict[str, Any], folder: Path) -> list[str]:
    """The summary for the terminal."""
    captions = summary["captions"]
    width = max(map(len, MEANINGS))
    counted = [
        f"  {kind:<{width}} {count:>9,}  {MEANINGS[kind]}"
        for kind, count in summary["findings"].items()
    ]
    cut = captions["too_long"] / max(captions["captions"], 1)
    texts = f"captions: {captions['captions']:,}, {cut:.2%} cut at {captions['length']} tokens"
    if captions["left_out"]:
        texts += f"; {captions['left_out']:,} without one are left out by the source itself"
    return [
        f"{summary['data']}: {verdict(summary)}",
        *counted,
        texts,
        f"page: {folder / 'report.html'}",
        f"cleaned: {summary['use'] or 'nothing stays'}",
    ]
