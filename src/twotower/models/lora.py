"""Low-rank adapters (LoRA, Hu et al. 2022) in the encoders, by peft."""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from twotower.model_config import PretrainedConfig
from twotower.models.dual_encoder import DualEncoder, ModelBundle, Tower
from twotower.models.locking import keep_locked_parts_in_evaluation
from twotower.settings import ConfigError


def add_adapters(
    model: DualEncoder, config: PretrainedConfig, images: Tensor, tokens: Tensor
) -> None:
    """Lock the trained encoders' weights and train adapters beside them; heads stay as they are.

    Adapters stand in the linear layers and 1x1 convolutions of the unlocked stages. They begin at
    nothing, so that the features stay those of the weights, to the bit.

    Args:
        images, tokens: one picture (1, 3, H, W) and one caption (1, L), to see which layers are
            called: fused attention reads weights of layers that it never calls, where an adapter
            would have no effect.

    Raises:
        ConfigError: peft is not installed, or an encoder has no layer that is asked for.
    """
    if not config.lora_rank:
        return
    layers: dict[str, list[str]] = {}
    trunks: dict[str, nn.Module] = {}
    for side, tower, inputs in (
        ("image", model.image_tower, images),
        ("text", model.text_tower, tokens),
    ):
        assert isinstance(tower, Tower)
        if not tower.locked:
            trunks[side] = tower.trunk
            layers[side] = _called_layers(tower.trunk, inputs)
    for side, names in _chosen(layers, config.lora_targets).items():
        _inject(trunks[side], names, config)
        keep_locked_parts_in_evaluation(trunks[side])


def merge_adapters(bundle: ModelBundle) -> ModelBundle:
    """A bundle whose adapters are added into the weights, as one without LoRA; itself without any.

    Its features equal those of the adapted one up to rounding. The given bundle stays as it is.
    """
    config = bundle.config
    if not isinstance(config, PretrainedConfig) or not config.lora_rank:
        return bundle
    from peft.tuners.tuners_utils import BaseTunerLayer

    model = copy.deepcopy(bundle.model)
    for name, module in list(model.named_modules()):
        if isinstance(module, BaseTunerLayer):
            adapted: Any = module
            adapted.merge()
            parent, _, last = name.rpartition(".")
            setattr(model.get_submodule(parent), last, adapted.get_base_layer())
    return replace(bundle, model=model, config=replace(config, lora_rank=0))


def _chosen(layers: Mapping[str, list[str]], targets: list[str]) -> dict[str, list[str]]:
    """The layers of each encoder that get adapters, of those that can have them."""
    chosen = {}
    for side, names in layers.items():
        if not names:
            raise ConfigError(
                f"model.lora_rank: the {side} encoder has no linear layer or 1x1 convolution in "
                f"its unlocked stages; use 0, or model.{side}_unlocked_stages=0"
            )
        chosen[side] = [name for name in names if not targets or _ends_in(name, targets)]
        if not chosen[side]:
            raise ConfigError(
                f"model.lora_targets has no layer of the {side} encoder, which has {_ends(names)}; "
                f"add one, or use model.{side}_unlocked_stages=0"
            )
    everything = [name for names in layers.values() for name in names]
    for target in targets:
        if not any(_ends_in(name, [target]) for name in everything):
            raise ConfigError(
                f"model.lora_targets: no layer that can be adapted is named {target}; there are "
                f"{_ends(everything)}"
            )
    return chosen


def _ends_in(name: str, targets: list[str]) -> bool:
    return any(f".{name}".endswith(f".{target}") for target in targets)


def _ends(names: list[str]) -> str:
    """What kinds of layers there are, for a sentence."""
    return ", ".join(sorted({_end(name) for name in names}))


def _end(name: str) -> str:
    """The end of a layer's name that tells what it is, not which of its kind."""
    parts = name.split(".")
    return ".".join(parts[-2:]) if parts[-1].isdigit() else parts[-1]


def _called_layers(trunk: nn.Module, inputs: Tensor) -> list[str]:
    """The trained linear layers and 1x1 convolutions that a forward pass calls, by name."""
    called: set[nn.Module] = set()
    layers = {name: module for name, module in trunk.named_modules() if _is_linear(module)}
    hooks = [
        module.register_forward_pre_hook(lambda module, _: called.add(module))
        for module in layers.values()
    ]
    was_training = trunk.training
    with torch.no_grad():
        trunk.eval()(inputs)
    trunk.train(was_training)
    for hook in hooks:
        hook.remove()
    return [name for name, module in layers.items() if module in called]


def _is_linear(module: nn.Module) -> bool:
    """Whether a module is a trained product with a matrix, and computes nothing else."""
    if isinstance(module, nn.Conv2d):
        plain = type(module).forward is nn.Conv2d.forward
        fits = plain and module.kernel_size == (1, 1) and module.groups == 1
    else:
        fits = isinstance(module, nn.Linear) and type(module).forward is nn.Linear.forward
    return fits and all(parameter.requires_grad for parameter in module.parameters())


def _inject(trunk: nn.Module, names: list[str], config: PretrainedConfig) -> None:
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError as error:
        raise ConfigError(
            "model.lora_rank needs the package peft; run: pip install twotower[lora]"
        ) from error
    # A pattern, since a list would match the ends of other names too.
    pattern = "|".join(re.escape(name) for name in names)
    settings: Mapping[str, Any] = {
        "r": config.lora_rank,
        "lora_alpha": config.lora_alpha,
        "lora_dropout": config.lora_dropout,
    }
    inject_adapter_in_model(LoraConfig(target_modules=pattern, **settings), trunk)
