"""`openai_finetune`: a pretrained CLIP of OpenAI's architectures, trained on."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from twotower.checkpoint.download import cached_file, download, reach_hub
from twotower.checkpoint.openai import Architecture, clip_weights, infer_architecture, read_openai
from twotower.config import PretrainedConfig
from twotower.models.dual_encoder import MODELS, ModelBundle
from twotower.models.lora import add_adapters
from twotower.models.openai_clip import (
    ARCHITECTURES,
    Activation,
    architecture_of,
    build_bundle,
    build_towers,
    load_openai_weights,
)
from twotower.models.preprocess import ImageInput, Interpolation, rgb
from twotower.settings import ConfigError, setting

OPENAI = "openai"
DEFAULT_ARCHITECTURE = "ViT-B/32"
SUFFIXES = (".pt", ".pth", ".bin", ".safetensors", ".ckpt")


@dataclass(kw_only=True)
class OpenaiFinetuneConfig(PretrainedConfig):
    """A pretrained CLIP and what of it is trained."""

    architecture: str = setting(
        "", "OpenAI's name, from RN50 to ViT-L/14@336px; empty: what the file holds, else ViT-B/32"
    )
    weights: str = setting(
        OPENAI, "openai (downloaded once), a .pt file in OpenAI's format, or a tag of open_clip's"
    )
    cache_dir: str = setting("~/.cache/clip", "folder that keeps OpenAI's downloaded archives")
    activation: Activation = setting(
        Activation.auto,
        "auto: what the weights were trained with (a file: quick_gelu, as OpenAI's); or "
        "quick_gelu, gelu",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        names = [name for name in ARCHITECTURES if name != "tiny"]
        if self.architecture and self.architecture not in names:
            raise ConfigError(
                f"model.architecture has no {self.architecture!r}; it is one of {', '.join(names)}"
            )
        if self.image_unlocked_stages == self.text_unlocked_stages == 0:
            raise ConfigError(
                "model.image_unlocked_stages=0 and model.text_unlocked_stages=0 leave nothing to "
                "train; unlock a stage of one (1 is its projection)"
            )


@dataclass(frozen=True, kw_only=True)
class _Source:
    """Weights under OpenAI's names, where they are from, and what they were trained with."""

    weights: dict[str, Tensor]
    name: str
    image: Mapping[str, Any] | None = None
    quick_gelu: bool = True


@MODELS.register("openai_finetune", OpenaiFinetuneConfig)
def build_openai_finetune(
    config: OpenaiFinetuneConfig, assets: Mapping[str, str] | None = None
) -> ModelBundle:
    """A pretrained CLIP in fp32, with the activation that its weights were trained with.

    Raises:
        ConfigError: the weights cannot be found or read, or are of another architecture.
    """
    if assets is not None:
        architecture = architecture_of(assets)
        image_input = ImageInput.from_json(assets["image_input"])
        source, quick_gelu = None, assets["activation"] == "quick_gelu"
    else:
        source = _find_weights(config)
        architecture = _checked_architecture(config, source)
        image_input = _image_input(architecture, source)
        quick_gelu = source.quick_gelu
        if config.activation is not Activation.auto:
            quick_gelu = config.activation is Activation.quick_gelu
    model = build_towers(
        architecture,
        image_input,
        quick_gelu=quick_gelu,
        image_unlocked=config.image_unlocked_stages,
        text_unlocked=config.text_unlocked_stages,
    )
    if source is not None:
        load_openai_weights(model, source.weights, source.name)
    bundle = build_bundle(config, model, architecture, image_input)
    pictures = torch.zeros(1, 3, image_input.size, image_input.size)
    add_adapters(model, config, pictures, bundle.tokenizer([""]))
    return bundle


def openai_archive(architecture: str) -> tuple[str, str]:
    """The address of OpenAI's archive and its SHA-256, which is part of the address."""
    from open_clip.pretrained import get_pretrained_url

    url: str = get_pretrained_url(_open_clip_name(architecture), OPENAI)
    return url, url.split("/")[-2]


def cached_openai_weights(config: OpenaiFinetuneConfig) -> Path | None:
    """OpenAI's archive if it was downloaded before and is whole, else None."""
    url, sha256 = openai_archive(config.architecture or DEFAULT_ARCHITECTURE)
    return cached_file(url, sha256, Path(config.cache_dir).expanduser())


def _open_clip_name(architecture: str) -> str:
    return architecture.replace("/", "-").replace("@336px", "-336")


def _find_weights(config: OpenaiFinetuneConfig) -> _Source:
    if config.weights == OPENAI:
        url, sha256 = openai_archive(config.architecture or DEFAULT_ARCHITECTURE)
        path = download(url, sha256, Path(config.cache_dir).expanduser())
        return _Source(weights=read_openai(path), name=str(path))
    path = Path(config.weights).expanduser()
    if path.exists() or os.sep in config.weights or path.suffix in SUFFIXES:
        return _Source(weights=_read_file(path), name=str(path))
    return _from_open_clip(config.architecture or DEFAULT_ARCHITECTURE, config.weights)


def _read_file(path: Path) -> dict[str, Tensor]:
    if path.suffix != ".safetensors":
        return read_openai(path)
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    if not path.is_file():
        raise ConfigError(f"model.weights: no such file: {path}")
    try:
        tensors = load_file(path)
    except SafetensorError as error:
        raise ConfigError(
            f"{path} cannot be read: it is truncated, or another kind of file"
        ) from error
    if "logit_scale" in tensors and any(name.startswith("image_tower.") for name in tensors):
        raise ConfigError(
            f"{path} is a checkpoint of twotower; write it in OpenAI's format first: "
            f"twotower export checkpoint={path} path=<name>.pt"
        )
    return clip_weights(tensors, path)


def _from_open_clip(architecture: str, tag: str) -> _Source:
    """The weights of one of open_clip's tags, with its activation and constants."""
    from open_clip import pretrained

    name = _open_clip_name(architecture)
    settings = pretrained.get_pretrained_cfg(name, tag)
    if not settings:
        tags = ", ".join(pretrained.list_pretrained_tags_by_model(name))
        raise ConfigError(
            f"model.weights={tag} is neither a file nor a tag of {architecture}; "
            f"the tags are {tags}"
        )
    reach_hub("model.weights", tag)
    try:
        path = Path(pretrained.download_pretrained(settings))
    # The hub's client raises its own errors, those of its HTTP library, and OSError.
    except Exception as error:
        raise ConfigError(
            f"cannot download {tag} of {architecture} for model.weights; try again, "
            "or give the path of a local file"
        ) from error
    return _Source(
        weights=_read_file(path),
        name=f"{architecture} {tag}",
        image=settings,
        quick_gelu=bool(settings.get("quick_gelu")),
    )


def _checked_architecture(config: OpenaiFinetuneConfig, source: _Source) -> Architecture:
    found = infer_architecture(source.weights)
    if config.architecture and ARCHITECTURES[config.architecture] != found:
        held = [name for name, known in ARCHITECTURES.items() if known == found]
        differing = [
            f"{key} {value}"
            for key, value in asdict(found).items()
            if asdict(ARCHITECTURES[config.architecture])[key] != value
        ]
        raise ConfigError(
            f"model.architecture is {config.architecture}, but {source.name} holds "
            f"{held[0] if held else 'another one'} ({', '.join(differing)}); "
            "leave model.architecture empty"
        )
    return found


def _image_input(architecture: Architecture, source: _Source) -> ImageInput:
    if source.image is None:
        return ImageInput(size=architecture.image_size)
    return ImageInput(
        size=architecture.image_size,
        mean=rgb(source.image["mean"]),
        std=rgb(source.image["std"]),
        interpolation=Interpolation[source.image["interpolation"]],
    )
