"""open_clip's folders: a state dict and `open_clip_config.json`, as its hub repositories hold."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from torch import Tensor

from twotower.checkpoint.clip import (
    HEAD_WIDTH,
    OPENAI_MEAN,
    OPENAI_STD,
    Architecture,
    ClipCheckpoint,
    Pixels,
    infer_architecture,
)
from twotower.checkpoint.foreign import check_size, head_width, read_json, three, whole
from twotower.checkpoint.native import write_tensors
from twotower.checkpoint.openai import clip_weights
from twotower.checkpoint.tensors import read_tensors
from twotower.settings import ConfigError

CONFIG = "open_clip_config.json"
WEIGHTS = "open_clip_model.safetensors"
# In the order in which open_clip's factory looks for them.
NAMES = (
    WEIGHTS,
    "open_clip_pytorch_model.safetensors",
    "open_clip_pytorch_model.bin",
    "open_clip_pytorch_model.pth",
    "model.safetensors",
    "pytorch_model.bin",
    "pytorch_model.pth",
    "model.pth",
)
KNOWN = {
    "model_cfg": {
        *("embed_dim", "vision_cfg", "text_cfg", "quick_gelu", "custom_text"),
        *("init_logit_scale", "init_logit_bias", "nonscalar_logit_scale", "output_dict"),
    },
    "vision_cfg": {"image_size", "layers", "width", "patch_size", "head_width", "mlp_ratio"},
    "text_cfg": {"context_length", "vocab_size", "width", "heads", "layers", "mlp_ratio"},
}


def read_open_clip(folder: Path, weights: Path | None = None) -> ClipCheckpoint:
    """The CLIP of a folder, or of one file in it, that says what it is in `open_clip_config.json`.

    Raises:
        ConfigError: a file is missing or damaged, or the model is not of OpenAI's architectures.
    """
    path = folder / CONFIG
    config = read_json(path)
    model = config.get("model_cfg", {})
    vision, text = model.get("vision_cfg"), model.get("text_cfg")
    if not isinstance(vision, dict) or not isinstance(text, dict):
        raise ConfigError(f"{path} has no model_cfg with a vision_cfg and a text_cfg")
    _check_plain(path, model, vision, text)
    pixels = _pixels(path, config.get("preprocess_cfg", {}))
    source = weights or find_weights(folder)
    tensors = clip_weights(read_tensors(source, "a file of open_clip's weights"), source)
    text_width = tensors["ln_final.weight"].shape[0]
    architecture = infer_architecture(
        tensors,
        vision_head_width=whole(path, vision.get("head_width", HEAD_WIDTH)),
        text_head_width=head_width(path, text_width, text.get("heads", 8)),
    )
    check_size(path, "image_size", vision.get("image_size", 224), architecture.image_size)
    check_size(path, "context_length", text.get("context_length", 77), architecture.context_length)
    return ClipCheckpoint(
        weights=tensors,
        architecture=architecture,
        quick_gelu=bool(model.get("quick_gelu", False)),
        pixels=pixels,
        source=str(source),
    )


def write_open_clip(folder: Path, clip: ClipCheckpoint) -> None:
    """Write what `open_clip.create_model("local-dir:<folder>")` opens into an existing folder.

    Raises:
        ConfigError: the folder cannot be written, or the disk is full.
    """
    weights = {name: tensor.float() for name, tensor in clip.weights.items()}
    config = {"model_cfg": _model_config(clip), "preprocess_cfg": _preprocess_config(clip)}
    (folder / CONFIG).write_text(json.dumps(config, indent=2) + "\n")
    write_tensors(folder / WEIGHTS, weights)


def find_weights(folder: Path) -> Path:
    for name in NAMES:
        if (folder / name).is_file():
            return folder / name
    others = [
        file for suffix in (".safetensors", ".bin", ".pth") for file in folder.glob(f"*{suffix}")
    ]
    if len(others) != 1:
        what = "several files of weights" if others else "no weights"
        raise ConfigError(f"{folder} holds {what}; open_clip's are in {WEIGHTS}")
    return others[0]


def _check_plain(
    path: Path, model: Mapping[str, Any], vision: Mapping[str, Any], text: Mapping[str, Any]
) -> None:
    """Refuse a config that asks for a part which OpenAI's architectures do not have."""
    from open_clip.model import CLIPTextCfg, CLIPVisionCfg

    odd = [key for key in model if key not in KNOWN["model_cfg"]]
    sections = {"vision_cfg": (vision, CLIPVisionCfg), "text_cfg": (text, CLIPTextCfg)}
    for section, (values, config_class) in sections.items():
        usual = {field.name: field.default for field in fields(config_class)}
        odd += [
            f"{section}.{key}"
            for key, value in values.items()
            if key not in KNOWN[section] and (key not in usual or value != usual[key])
        ]
    if odd:
        raise ConfigError(
            f"{path} asks for {', '.join(odd)}, which OpenAI's architectures do not have; "
            "only those can be read"
        )


def _pixels(path: Path, values: Mapping[str, Any]) -> Pixels:
    resize, way = values.get("resize_mode", "shortest"), values.get("interpolation", "bicubic")
    if resize != "shortest" or way not in ("bicubic", "bilinear"):
        raise ConfigError(
            f"{path} prepares pictures with resize_mode {resize} and interpolation {way}; twotower "
            "knows shortest, with bicubic or bilinear"
        )
    return Pixels(
        mean=three(path, values.get("mean", OPENAI_MEAN)),
        std=three(path, values.get("std", OPENAI_STD)),
        interpolation=way,
    )


def _model_config(clip: ClipCheckpoint) -> dict[str, Any]:
    made: Architecture = clip.architecture
    vision: dict[str, Any] = {
        "image_size": made.image_size,
        "layers": made.vision_layers,
        "width": made.vision_width,
        "head_width": made.vision_head_width,
        "mlp_ratio": made.vision_mlp_ratio,
        "patch_size": made.patch_size or None,
    }
    config: dict[str, Any] = {
        "embed_dim": made.embed_dim,
        "quick_gelu": bool(clip.quick_gelu),
        "vision_cfg": vision,
        "text_cfg": {
            "context_length": made.context_length,
            "vocab_size": made.vocab_size,
            "width": made.text_width,
            "heads": made.text_width // made.text_head_width,
            "layers": made.text_layers,
            "mlp_ratio": made.text_mlp_ratio,
        },
    }
    bias: Tensor | None = clip.weights.get("logit_bias")
    if bias is not None:
        config["init_logit_bias"] = float(bias)
    return config


def _preprocess_config(clip: ClipCheckpoint) -> dict[str, Any]:
    return {
        "mean": clip.pixels.mean,
        "std": clip.pixels.std,
        "interpolation": clip.pixels.interpolation,
        "resize_mode": "shortest",
    }
