"""How the encoders compute: their activations again in the backward pass, or by few pictures."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint

from twotower.distributed import is_main_process
from twotower.models.dual_encoder import DualEncoder, Tower
from twotower.models.huggingface_text import HuggingFaceText
from twotower.models.stages import bare_encoder
from twotower.settings import ConfigError

log = logging.getLogger(__name__)

CPU_ROWS = 32


def enable_grad_checkpointing(model: DualEncoder) -> None:
    """Let the trained encoders keep a block's input only and compute the rest again (Chen 2016).

    Gradients stay the same, and running statistics change once a step. Call it after
    `apply_batch_norm_policy`, which may replace the norms.

    Raises:
        ConfigError: an encoder cannot do that.
    """
    trained = [
        (side, bare_encoder(tower.trunk))
        for side, tower in _towers(model)
        if isinstance(tower, Tower) and any(p.requires_grad for p in tower.trunk.parameters())
    ]
    if not trained and is_main_process():
        log.warning("train.grad_checkpointing changes nothing: no encoder is trained")
    for side, encoder in trained:
        if not _checkpoint(encoder):
            raise ConfigError(
                f"train.grad_checkpointing: the {side} encoder has none; use false, and "
                "train.micro_batch_size where memory is short"
            )
        for module in encoder.modules():
            if isinstance(module, _BatchNorm):
                _count_once(module)


def encode_in_parts(model: DualEncoder, rows: int = CPU_ROWS) -> None:
    """Let the image encoder take a large batch so many pictures at a time, in one graph.

    For CPUs, whose caches hold the activations of a few pictures: EfficientNet-Lite0 with two
    trained stages does 256 pictures in less than half of the time. Features and gradients stay the
    same unless batch norms normalise by the batch, so call it without such.
    """
    tower = model.image_tower
    if isinstance(tower, Tower):
        tower.trunk.forward = partial(_in_parts, tower.trunk.forward, rows)


def _in_parts(forward: Callable[[Tensor], Tensor], rows: int, images: Tensor) -> Tensor:
    if len(images) <= rows:
        return forward(images)
    starts = range(0, len(images), rows)
    return torch.cat([forward(images[start : start + rows]) for start in starts])


def _towers(model: DualEncoder) -> Iterator[tuple[str, nn.Module]]:
    yield "image", model.image_tower
    yield "text", model.text_tower


def _checkpoint(encoder: nn.Module) -> bool:
    """Turn it on; False where the encoder has none."""
    if isinstance(encoder, HuggingFaceText):
        inner: Any = encoder.encoder
        if not getattr(inner, "supports_gradient_checkpointing", False):
            return False
        # The first name is that of transformers from 5.20 on.
        enable = getattr(inner, "activation_checkpointing_enable", None)
        (enable or inner.gradient_checkpointing_enable)({"use_reentrant": False})
        return True
    if type(encoder).__name__ == "ModifiedResNet":
        return _checkpoint_blocks(encoder)
    enable = getattr(encoder, "set_grad_checkpointing", None)
    if enable is None:
        return False
    try:
        enable(True)
    except AssertionError:  # how timm's models say that they have none
        return False
    return True


def _checkpoint_blocks(resnet: Any) -> bool:
    """open_clip's ModifiedResNet takes the request and does nothing: wrap its blocks."""
    for layer in (resnet.layer1, resnet.layer2, resnet.layer3, resnet.layer4):
        for block in layer:
            block.forward = partial(checkpoint, block.forward, use_reentrant=False)
    return True


def _count_once(norm: _BatchNorm) -> None:
    """Let the second forward pass of a checkpointed block leave running statistics alone."""
    momentum = norm.momentum

    def before(module: nn.Module, _: Any) -> None:
        if torch.compiler.is_compiling():  # a compiled step changes buffers once
            return
        again = torch._C._current_graph_task_id() != -1  # within a backward pass
        norm.momentum = 0.0 if again else momentum
        if again and norm.training and norm.num_batches_tracked is not None:
            norm.num_batches_tracked.sub_(1)

    norm.register_forward_pre_hook(before)
