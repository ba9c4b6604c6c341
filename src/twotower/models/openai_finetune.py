"""`openai_finetune`: a pretrained CLIP of OpenAI's architectures, trained on."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch

from twotower.checkpoint.clip import Architecture, ClipCheckpoint, Pixels, infer_architecture
from twotower.checkpoint.download import cached_file, download, reach_hub
from twotower.checkpoint.openai import clip_weights
from twotower.checkpoint.tensors import read_tensors
from twotower.model_config import PretrainedConfig
from twotower.models.clip_weights import FORMATS, read_clip
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

log = logging.getLogger(__name__)

OPENAI = "openai"
OPENAI_VOCABULARY = 49408
DEFAULT_ARCHITECTURE = "ViT-B/32"
SUFFIXES = (".pt", ".pth", ".bin", ".safetensors", ".ckpt")


@dataclass(kw_only=True)
class OpenaiFinetuneConfig(PretrainedConfig):
    """A pretrained CLIP and what of it is trained."""

    architecture: str = setting(
        "", "OpenAI's name, from RN50 to ViT-L/14@336px; empty: what the file holds, else ViT-B/32"
    )
    weights: str = setting(OPENAI, f"openai (downloaded once); {FORMATS}; or a tag of open_clip's")
    cache_dir: str = setting("~/.cache/clip", "folder that keeps OpenAI's downloaded archives")
    activation: Activation = setting(
        Activation.auto,
        "auto: what the weights were trained with (quick_gelu, as OpenAI's, where their file "
        "does not tell); or quick_gelu, gelu",
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
        clip, quick_gelu = None, assets["activation"] == "quick_gelu"
    else:
        clip = _find_weights(config)
        architecture = _checked_architecture(config, clip)
        image_input = _image_input(clip)
        quick_gelu = _quick_gelu(config, clip)
    model = build_towers(
        architecture,
        image_input,
        quick_gelu=quick_gelu,
        image_unlocked=config.image_unlocked_stages,
        text_unlocked=config.text_unlocked_stages,
    )
    if clip is not None:
        load_openai_weights(model, clip.weights, clip.source)
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


def _find_weights(config: OpenaiFinetuneConfig) -> ClipCheckpoint:
    if config.weights == OPENAI:
        url, sha256 = openai_archive(config.architecture or DEFAULT_ARCHITECTURE)
        path = download(url, sha256, Path(config.cache_dir).expanduser())
        return replace(read_clip(path), quick_gelu=True)
    path = Path(config.weights).expanduser()
    if path.exists() or os.sep in config.weights or path.suffix in SUFFIXES:
        return read_clip(path)
    return _from_open_clip(config.architecture or DEFAULT_ARCHITECTURE, config.weights)


def _from_open_clip(architecture: str, tag: str) -> ClipCheckpoint:
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
    weights = clip_weights(read_tensors(path, "a file of open_clip's weights"), path)
    return ClipCheckpoint(
        weights=weights,
        architecture=infer_architecture(weights),
        quick_gelu=bool(settings.get("quick_gelu")),
        pixels=Pixels(
            mean=rgb(settings["mean"]),
            std=rgb(settings["std"]),
            interpolation=settings["interpolation"],
        ),
        source=f"{architecture} {tag}",
    )


def _checked_architecture(config: OpenaiFinetuneConfig, clip: ClipCheckpoint) -> Architecture:
    found = clip.architecture
    if found.vocab_size < OPENAI_VOCABULARY:
        raise ConfigError(
            f"{clip.source} knows {found.vocab_size} tokens, but OpenAI's tokenizer, which "
            f"model=openai_finetune uses, has {OPENAI_VOCABULARY}"
        )
    if config.architecture and ARCHITECTURES[config.architecture] != found:
        held = [name for name, known in ARCHITECTURES.items() if known == found]
        differing = [
            f"{key} {value}"
            for key, value in asdict(found).items()
            if asdict(ARCHITECTURES[config.architecture])[key] != value
        ]
        raise ConfigError(
            f"model.architecture is {config.architecture}, but {clip.source} holds "
            f"{held[0] if held else 'another one'} ({', '.join(differing)}); "
            "leave model.architecture empty"
        )
    return found


def _quick_gelu(config: OpenaiFinetuneConfig, clip: ClipCheckpoint) -> bool:
    """The activation that is asked for, else that of the weights, else OpenAI's."""
    if config.activation is not Activation.auto:
        return config.activation is Activation.quick_gelu
    if clip.quick_gelu is None:
        log.info(
            "%s does not tell its activation; QuickGELU is taken, as in OpenAI's weights "
            "(model.activation=gelu changes that)",
            clip.source,
        )
        return True
    return clip.quick_gelu


def _image_input(clip: ClipCheckpoint) -> ImageInput:
    return ImageInput(
        size=clip.architecture.image_size,
        mean=clip.pixels.mean,
        std=clip.pixels.std,
        interpolation=Interpolation[clip.pixels.interpolation],
    )
