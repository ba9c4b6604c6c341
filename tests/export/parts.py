"""What the tests of all formats share."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from twotower.config import ExportFormat
from twotower.export.formats import export_bundle
from twotower.export.probe import make_probe
from twotower.models.dual_encoder import ModelBundle

TEXTS = ["a dog on the beach", "", "the black cat! 12 " * 9]


def export(bundle: ModelBundle, kind: str, path: Path) -> str:
    """`twotower export` without the command line, on pictures that come with matplotlib."""
    probe = make_probe(bundle, path.parent / "no run here" / "best.safetensors")
    return export_bundle(bundle, ExportFormat[kind], path, probe)


def random_images(bundle: ModelBundle, count: int = 3) -> Tensor:
    size = bundle.eval_transform.size  # type: ignore[attr-defined]
    return torch.randint(0, 256, (count, 3, size, size), dtype=torch.uint8)


def features(bundle: ModelBundle, images: Tensor) -> tuple[Tensor, Tensor]:
    with torch.no_grad():
        bundle.model.eval()
        of_texts = bundle.model.encode_text(bundle.tokenizer(TEXTS))
        return bundle.model.encode_image(images), of_texts
