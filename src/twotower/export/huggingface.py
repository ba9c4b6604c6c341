"""Hugging Face's format: a folder that `CLIPModel` and `CLIPProcessor` open."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from twotower.checkpoint.huggingface import write_huggingface
from twotower.export.probe import Features, Probe, check_equal, features_of
from twotower.export.tokenizers import openai_tokenizer
from twotower.models.clip_weights import clip_of
from twotower.models.dual_encoder import ModelBundle


def write(bundle: ModelBundle, folder: Path) -> None:
    """Write config, weights, the preparation of pictures and the tokenizer into a folder.

    Raises:
        ConfigError: the bundle is no OpenAI architecture, or its image tower is a ResNet.
    """
    write_huggingface(folder, clip_of(bundle))
    tokenizer = openai_tokenizer(bundle.tokenizer.context_length)
    tokenizer.save_pretrained(folder)
    # For readers older than tokenizer.json.
    tokenizer.backend_tokenizer.model.save(str(folder))


def check(bundle: ModelBundle, folder: Path, probe: Probe) -> None:
    """Read the folder with transformers: its model, its processor, its tokenizer.

    Raises:
        RuntimeError: the features differ.
    """
    from transformers import CLIPModel, CLIPProcessor
    from transformers.utils import logging as transformers_logging

    transformers_logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    model: Any = CLIPModel.from_pretrained(folder)
    processor: Any = CLIPProcessor.from_pretrained(folder)
    pictures = processor(images=probe.images(), return_tensors="pt")
    texts = processor(
        text=list(probe.captions), padding="max_length", truncation=True, return_tensors="pt"
    )
    model.eval()
    with torch.inference_mode():
        found: Features = (
            _pooled(model.get_image_features(**pictures)),
            _pooled(model.get_text_features(**texts)),
        )
    check_equal(features_of(bundle.model, bundle.tokenizer, probe), found, "CLIPModel")


def hint(bundle: ModelBundle, folder: Path) -> str:
    """How the folder is opened elsewhere."""
    name = repr(str(folder))
    return f"CLIPModel.from_pretrained({name}) and CLIPProcessor.from_pretrained({name})"


def _pooled(output: Any) -> Tensor:
    """The features, which the first releases of transformers 5 give as they are."""
    features: Tensor = output if isinstance(output, Tensor) else output.pooler_output
    return features
