"""Checkpoints of whole bundles: one file becomes the model, its tokenizer and its transforms."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

from torch import Tensor

from twotower.checkpoint.native import load_checkpoint, save_checkpoint
from twotower.model_config import ModelConfig
from twotower.models.dual_encoder import MODELS, ModelBundle
from twotower.settings import ConfigError, from_plain, to_plain

FORMAT = 1
TRAINING = "training."  # begins the names of tensors that only a resumed run reads


def save_bundle(
    path: Path,
    bundle: ModelBundle,
    training_tensors: Mapping[str, Tensor] | None = None,
    **about: Any,
) -> None:
    """Write a model with its config and assets; `about` (run, step, metrics, ...) is plain JSON.

    `training_tensors` (moments of an optimiser, random states) go into the same file, so that they
    can never be of another step than the weights.

    Raises:
        ConfigError: the folder cannot be written, or the disk is full; a previous file stays.
    """
    header = {
        "format": FORMAT,
        "variant": bundle.config.registered_name,
        "model": to_plain(bundle.config),
        "assets": bundle.assets,
        **about,
    }
    extra = {f"{TRAINING}{name}": tensor for name, tensor in (training_tensors or {}).items()}
    save_checkpoint(path, {**bundle.model.state_dict(), **extra}, header)


def load_bundle(path: Path) -> ModelBundle:
    """The bundle that `save_bundle` wrote, in evaluation mode on the CPU, from `path` alone.

    Raises:
        ConfigError: missing, truncated, not a checkpoint of twotower, or of a newer version.
    """
    header, weights = load_checkpoint(path)
    _check(path, header, list(MODELS))
    config_class = cast(type[ModelConfig], MODELS.config_class(header["variant"]))
    config = from_plain(config_class, header["model"])
    bundle = MODELS.build(config, assets=header["assets"])
    _fill(path, bundle, weights)
    bundle.model.eval()
    return bundle


def load_weights(path: Path, bundle: ModelBundle) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Put a checkpoint's weights into a bundle that is built already.

    Weights without adapters go below the adapters (LoRA) of a bundle that has them.

    Returns:
        The header, and the training tensors that `save_bundle` was given.

    Raises:
        ConfigError: as `load_bundle`, or the checkpoint is of another variant or of other sizes.
    """
    header, tensors = load_checkpoint(path)
    _check(path, header, [header.get("variant")])
    wanted = bundle.config.registered_name
    if header["variant"] != wanted:
        raise ConfigError(
            f"{path} is a checkpoint of {header['variant']}, not of {wanted}; "
            f"use model={header['variant']}, or another checkpoint"
        )
    _fill(path, bundle, tensors)
    extra = {k.removeprefix(TRAINING): v for k, v in tensors.items() if k.startswith(TRAINING)}
    return header, extra


def _check(path: Path, header: dict[str, Any], variants: Sequence[Any]) -> None:
    if header.get("format") != FORMAT or header.get("variant") not in variants:
        raise ConfigError(
            f"{path} holds variant {header.get('variant')!r} in format {header.get('format')}, "
            "which this version of twotower does not know"
        )


def _fill(path: Path, bundle: ModelBundle, weights: dict[str, Tensor]) -> None:
    own = {name: tensor for name, tensor in weights.items() if not name.startswith(TRAINING)}
    if "logit_bias" in own:
        bundle.model.start_temperature(0.0, 0.0)
    wanted = bundle.model.state_dict()
    if not any(".base_layer." in name for name in own):
        adapted = {n.replace(".base_layer.", "."): n for n in wanted if ".base_layer." in n}
        own = {adapted.get(name, name): tensor for name, tensor in own.items()}
        own |= {n: tensor for n, tensor in wanted.items() if adapted and ".lora_" in n}
    try:
        bundle.model.load_state_dict(own)
    except RuntimeError as error:
        reason = str(error).strip().splitlines()[1].strip()
        raise ConfigError(f"the weights of {path} do not fit its config: {reason[:200]}") from error
