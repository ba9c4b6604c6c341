"""Hugging Face's `CLIPModel` folders: config.json, model.safetensors, preprocessor_config.json.

The files are read as JSON and tensors; no model of transformers is built and no code that a folder
brings is run.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from torch import Tensor

from twotower.checkpoint.clip import (
    OPENAI_MEAN,
    OPENAI_STD,
    ClipCheckpoint,
    Pixels,
    infer_architecture,
)
from twotower.checkpoint.foreign import check_size, head_width, read_json, three
from twotower.checkpoint.huggingface_names import from_huggingface, to_huggingface
from twotower.checkpoint.native import write_tensors
from twotower.checkpoint.openai import clip_weights
from twotower.checkpoint.tensors import read_tensors
from twotower.settings import ConfigError

CONFIG, WEIGHTS, PREPROCESSOR = "config.json", "model.safetensors", "preprocessor_config.json"
NAMES = (WEIGHTS, "pytorch_model.bin")
RESAMPLE = {2: "bilinear", 3: "bicubic"}  # Pillow's numbers
KIND = "a file of a CLIPModel's weights"
EPSILON = 1e-5  # of the layer norms, in OpenAI's architectures
TOKENS = {"bos_token_id": 49406, "eos_token_id": 49407}  # of OpenAI's byte pairs
ENDS = (TOKENS["eos_token_id"], 2)  # 2 is written in old files and means the highest id, the same


def read_huggingface(folder: Path) -> ClipCheckpoint:
    """The CLIP of a folder that `CLIPModel.save_pretrained` wrote, or of a hub repository.

    Raises:
        ConfigError: a file is missing or damaged, the model is no CLIP, or one that twotower's
            towers cannot hold.
    """
    path = folder / CONFIG
    text, vision = _configs(path)
    if text["hidden_act"] != vision["hidden_act"]:
        raise ConfigError(
            f"{path} gives the towers different activations, {vision['hidden_act']} and "
            f"{text['hidden_act']}; twotower's have one"
        )
    if vision["hidden_act"] not in ("quick_gelu", "gelu"):
        raise ConfigError(
            f"{path} asks for the activation {vision['hidden_act']}; twotower has quick_gelu, gelu"
        )
    for name, values in (("text_config", text), ("vision_config", vision)):
        if values["layer_norm_eps"] != EPSILON:
            raise ConfigError(
                f"{path} gives {name} a layer_norm_eps of {values['layer_norm_eps']}; twotower's "
                f"towers have {EPSILON}"
            )
    if text["eos_token_id"] not in ENDS:
        raise ConfigError(
            f"{path} ends captions with token {text['eos_token_id']}, but OpenAI's tokenizer, "
            f"which twotower uses, with {TOKENS['eos_token_id']}"
        )
    weights = clip_weights(from_huggingface(_tensors(folder)), folder)
    vision_width = weights["visual.conv1.weight"].shape[0]
    text_width = weights["ln_final.weight"].shape[0]
    architecture = infer_architecture(
        weights,
        vision_head_width=head_width(path, vision_width, vision["num_attention_heads"]),
        text_head_width=head_width(path, text_width, text["num_attention_heads"]),
    )
    check_size(path, "image_size", vision["image_size"], architecture.image_size)
    return ClipCheckpoint(
        weights=weights,
        architecture=architecture,
        quick_gelu=vision["hidden_act"] == "quick_gelu",
        pixels=_pixels(folder),
        source=str(folder),
    )


def write_huggingface(folder: Path, clip: ClipCheckpoint) -> None:
    """Write what `CLIPModel.from_pretrained(folder)` opens into an existing folder.

    The tokenizer's files are not among it.

    Raises:
        ConfigError: the image tower is no vision transformer, which is all that `CLIPModel` has;
            the folder cannot be written, or the disk is full.
    """
    if not clip.architecture.patch_size:
        raise ConfigError(
            "Hugging Face's CLIPModel has vision transformers only, and this image tower is a "
            "ResNet; use format=openai, open_clip or onnx"
        )
    (folder / CONFIG).write_text(json.dumps(_config(clip), indent=2) + "\n")
    (folder / PREPROCESSOR).write_text(json.dumps(_preprocessor(clip), indent=2) + "\n")
    write_tensors(folder / WEIGHTS, dict(to_huggingface(clip.weights)))


def _configs(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """The text and the vision section of config.json, with transformers' defaults filled in."""
    from transformers import CLIPConfig

    plain = read_json(path)
    kind = plain.get("model_type")
    if kind != "clip":
        raise ConfigError(f"{path} describes a model of type {kind}, not clip")
    try:
        config: Any = CLIPConfig.from_dict(plain)
    # Its checks raise errors of several kinds.
    except Exception as error:
        reason = str(error).strip().splitlines()[-1]
        raise ConfigError(f"{path} is not the config of a CLIPModel: {reason}") from error
    return config.text_config.to_dict(), config.vision_config.to_dict()


def _tensors(folder: Path) -> dict[str, Tensor]:
    """All weights of a folder, from one file or from those that an index lists."""
    for name in NAMES:
        if (folder / name).is_file():
            return read_tensors(folder / name, KIND)
        index = folder / f"{name}.index.json"
        if index.is_file():
            places = read_json(index).get("weight_map")
            if not isinstance(places, dict):
                raise ConfigError(f"{index} has no weight_map")
            files = sorted({Path(str(file)).name for file in places.values()})
            shards = [read_tensors(folder / file, KIND) for file in files]
            return {key: tensor for shard in shards for key, tensor in shard.items()}
    raise ConfigError(f"{folder} holds a {CONFIG} and no {' or '.join(NAMES)}")


def _pixels(folder: Path) -> Pixels:
    """What the image processor does; OpenAI's if the folder does not tell."""
    path, together = folder / PREPROCESSOR, folder / "processor_config.json"
    if path.is_file():
        values = read_json(path)
    elif together.is_file():
        path, values = together, read_json(together).get("image_processor", {})
    else:
        return Pixels()
    skipped = [key for key in ("do_resize", "do_rescale", "do_normalize") if not values.get(key, 1)]
    way = values.get("resample", 3)
    if skipped or way not in RESAMPLE:
        what = f"{skipped[0]} false" if skipped else f"resample {way}"
        raise ConfigError(
            f"{path} prepares pictures with {what}; twotower resizes (bicubic or bilinear), "
            "rescales and normalises"
        )
    return Pixels(
        mean=three(path, values.get("image_mean", OPENAI_MEAN)),
        std=three(path, values.get("image_std", OPENAI_STD)),
        interpolation=RESAMPLE[way],
    )


def _config(clip: ClipCheckpoint) -> dict[str, Any]:
    from transformers import CLIPConfig

    made = clip.architecture
    activation = "quick_gelu" if clip.quick_gelu else "gelu"
    config = CLIPConfig(
        projection_dim=made.embed_dim,
        text_config={
            **TOKENS,
            "vocab_size": made.vocab_size,
            "hidden_size": made.text_width,
            "intermediate_size": int(made.text_width * made.text_mlp_ratio),
            "projection_dim": made.embed_dim,
            "num_hidden_layers": made.text_layers,
            "num_attention_heads": made.text_width // made.text_head_width,
            "max_position_embeddings": made.context_length,
            "hidden_act": activation,
        },
        vision_config={
            "hidden_size": made.vision_width,
            "intermediate_size": int(made.vision_width * made.vision_mlp_ratio),
            "projection_dim": made.embed_dim,
            "num_hidden_layers": made.vision_layers,
            "num_attention_heads": made.vision_width // made.vision_head_width,
            "image_size": made.image_size,
            "patch_size": made.patch_size,
            "hidden_act": activation,
        },
    )
    plain: dict[str, Any] = json.loads(config.to_json_string(use_diff=False))
    return {**plain, "architectures": ["CLIPModel"], "dtype": "float32"}


def _preprocessor(clip: ClipCheckpoint) -> dict[str, Any]:
    numbers = {name: number for number, name in RESAMPLE.items()}
    size = clip.architecture.image_size
    return {
        "image_processor_type": "CLIPImageProcessor",
        "do_convert_rgb": True,
        "do_resize": True,
        "size": {"shortest_edge": size},
        "resample": numbers[clip.pixels.interpolation],
        "do_center_crop": True,
        "crop_size": {"height": size, "width": size},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(clip.pixels.mean),
        "image_std": list(clip.pixels.std),
    }
