"""What `twotower classify` does: pictures are labelled with the nearest entries of a vocabulary."""

from __future__ import annotations

import csv
import hashlib
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from rich.table import Table
from rich.text import Text

from twotower.checkpoint.atomic import replacing
from twotower.checkpoint.native import file_sha256
from twotower.config import Config, FreeText, IndexConfig
from twotower.console import print_table, progress, say
from twotower.data.folder import list_pictures
from twotower.data.templates import text_or_templates
from twotower.distributed import resolve_device
from twotower.embedding.encoder import Encoder
from twotower.embedding.fingerprint import check_space
from twotower.embedding.store import EmbeddingStore
from twotower.retrieval.build import build_index
from twotower.retrieval.index import NO_ID, AnyFloatArray, FloatArray
from twotower.retrieval.search.opening import checkpoint_of
from twotower.retrieval.search.query_vectors import text_vectors
from twotower.retrieval.search.vocabulary import Vocabulary, load_vocabulary
from twotower.runs import checkpoint_path, logs_path, store_path
from twotower.search_config import ClassifyConfig
from twotower.settings import ConfigError

log = logging.getLogger(__name__)

TEMPLATE = "a photo of a {}."
SHOWN = 25  # pictures in the table on the terminal
BATCH = 256  # pictures between two steps of the progress


@dataclass(frozen=True)
class Label:
    """One entry of a vocabulary found for a picture, and its score."""

    name: str
    score: float


class Classifier:
    """A vocabulary as a text index.

    Attributes:
        vectors: of its entries (N, D), of unit norm.
    """

    def __init__(
        self, vocabulary: Vocabulary, vectors: FloatArray, config: IndexConfig, seed: int = 1
    ) -> None:
        self.vocabulary = vocabulary
        self.vectors = vectors
        self.index = build_index(config, vectors, seed=seed)

    def labels(
        self, pictures: AnyFloatArray, k: int = 1, threshold: float = -np.inf
    ) -> list[list[Label]]:
        """The k nearest entries of each picture's vector (Q, D), best first, from a score on."""
        scores, ids = self.index.search(pictures, min(k, len(self.vocabulary)))
        return [
            [
                Label(self.vocabulary.labels[number], float(score))
                for score, number in zip(row_scores, row_ids, strict=True)
                if number != NO_ID and score >= threshold
            ]
            for row_scores, row_ids in zip(scores, ids, strict=True)
        ]


def classify(config: Config, free: FreeText) -> None:
    """Label a picture, the pictures of a folder, or those of a store; print and write the labels.

    Raises:
        ConfigError: no vocabulary, no pictures, or no checkpoint to encode with.
    """
    section = config.classify
    if not section.vocabulary:
        raise ConfigError(
            "classify needs classify.vocabulary=<a file or URL with a word a line or a JSON tree>"
        )
    cache = Path(config.run.models_dir) / "vocabularies"
    max_bytes = int(section.max_megabytes * 1e6)
    vocabulary = load_vocabulary(section.vocabulary, cache, max_bytes, refresh=section.refresh)
    templates = text_or_templates(section.templates or TEMPLATE, "classify.templates")
    pictures = pictures_at(Path(free.path)) if free.path is not None else []
    store = EmbeddingStore.open(store_path(config)) if free.path is None else None
    encoder, sha256 = _encoder(config, store)
    vectors = kept_vectors(vocabulary, templates, encoder, sha256, cache)
    classifier = Classifier(vocabulary, vectors, config.index, config.seed)
    if store is None:
        rows = _of_files(pictures, encoder, classifier, section)
    else:
        rows = _of_store(store, classifier, section)
    output = Path(section.output or logs_path(config) / "classify" / "labels.csv")
    _show(_written(rows, output), output)


def _encoder(config: Config, store: EmbeddingStore | None) -> tuple[Encoder, str]:
    """The encoder of the run's checkpoint, or of the one that made a store, and its SHA-256."""
    if config.distributed.num_threads:
        torch.set_num_threads(config.distributed.num_threads)
    asked = config.checkpoint
    checkpoint = checkpoint_path(config) if store is None else checkpoint_of(store, asked)
    if not checkpoint.is_file():
        raise ConfigError(f"there is no checkpoint at {checkpoint}; give checkpoint=...")
    device = resolve_device(config.distributed)
    encoder = Encoder.load(checkpoint, device, batch_size=config.classify.batch_size)
    if store is not None:
        here = f"checkpoint {checkpoint}"
        check_space(store.manifest, store.folder, encoder.description(), here)
    return encoder, file_sha256(checkpoint)


def pictures_at(path: Path) -> list[Path]:
    """A picture, or all in a folder.

    Raises:
        ConfigError: there is none.
    """
    if path.is_dir():
        found = [path / name for name in list_pictures(path)]
        if not found:
            raise ConfigError(f"{path} has no pictures")
        return found
    if not path.is_file():
        raise ConfigError(f"path={path}: there is no such picture or folder")
    return [path]


def kept_vectors(
    vocabulary: Vocabulary,
    templates: Sequence[str],
    encoder: Encoder,
    checkpoint_sha256: str,
    cache: Path,
) -> FloatArray:
    """The vectors (N, D) of a vocabulary, encoded once for each checkpoint and set of prompts."""
    about = repr((vocabulary.words, tuple(templates), checkpoint_sha256, encoder.text_length))
    kept = cache / f"{hashlib.sha256(about.encode()).hexdigest()[:16]}.npy"
    if kept.is_file():
        vectors: FloatArray = np.load(kept)
        return vectors
    log.info("encoding %d entries with %d prompts each", len(vocabulary), len(templates))
    vectors = text_vectors(vocabulary.words, encoder, templates)
    with replacing(kept) as temporary, temporary.open("wb") as file:
        np.save(file, vectors)
    return vectors


Rows = Iterator[tuple[str, list[Label]]]


def _of_store(store: EmbeddingStore, classifier: Classifier, section: ClassifyConfig) -> Rows:
    """The labels of a store's pictures, which need not be read again."""
    for place, rows in enumerate(store.image_shards()):
        paths = store.table(place, ["image_path"])["image_path"].to_pylist()
        for start in range(0, len(rows), BATCH):
            part = np.asarray(rows[start : start + BATCH], np.float32)
            found = classifier.labels(part, section.k, section.threshold)
            yield from zip(paths[start : start + BATCH], found, strict=True)


def _of_files(
    pictures: Sequence[Path], encoder: Encoder, classifier: Classifier, section: ClassifyConfig
) -> Rows:
    """The labels of picture files; what cannot be read has none, and is named in the log."""
    with progress("labelling", len(pictures), "images") as line:
        for start in range(0, len(pictures), BATCH):
            part = pictures[start : start + BATCH]
            vectors = encoder.encode_images(part, errors="none")
            known = [vector for vector in vectors if vector is not None]
            found = iter(
                classifier.labels(np.stack(known), section.k, section.threshold) if known else []
            )
            for path, vector in zip(part, vectors, strict=True):
                if vector is None:
                    log.warning("%s cannot be read and has no label", path)
                yield str(path), [] if vector is None else next(found)
            line.advance(len(part))


def _written(rows: Rows, output: Path) -> list[tuple[str, list[Label]]]:
    """Write a line a label, `filepath,rank,label,score`; the first few pictures and the count."""
    first: list[tuple[str, list[Label]]] = []
    with replacing(output) as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(("filepath", "rank", "label", "score"))
        for path, labels in rows:
            if len(first) < SHOWN:
                first.append((path, labels))
            for rank, label in enumerate(labels, start=1):
                writer.writerow((path, rank, label.name, f"{label.score:.6f}"))
    return first


def _show(rows: Sequence[tuple[str, list[Label]]], output: Path) -> None:
    table = Table("score", "label", "path", box=None, pad_edge=False)
    table.columns[0].justify = "right"
    table.columns[2].overflow = "fold"
    for path, labels in rows:
        for label in labels:
            table.add_row(f"{label.score:.4f}", Text(label.name), Text(path))
    print_table(table)
    say(str(output))
