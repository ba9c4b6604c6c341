"""OpenAI's format: reading its archives and state dicts, and writing what `clip.load` opens."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from twotower.checkpoint.atomic import replacing
from twotower.checkpoint.tensors import read_tensors
from twotower.settings import ConfigError

NOT_WEIGHTS = ("input_resolution", "context_length", "vocab_size", "attn_mask")
NORM_OR_EMBEDDING = re.compile(
    r"(^|\.)(ln_|bn\d|downsample\.1|token_embedding|positional_embedding|class_embedding|logit_)"
)


def read_openai(path: Path) -> dict[str, Tensor]:
    """The weights of a CLIP by OpenAI's names, from a TorchScript archive or a plain state dict.

    Nothing that the file holds is run.

    Raises:
        ConfigError: missing, truncated, no CLIP of OpenAI's kind, or asking for more than tensors.
    """
    return clip_weights(read_tensors(path, "a file in OpenAI's format"), path)


def clip_weights(tensors: Mapping[str, Tensor], path: Path) -> dict[str, Tensor]:
    """Only the weights out of a loaded state dict, with OpenAI's names.

    Raises:
        ConfigError: it is not the state dict of a CLIP of OpenAI's kind.
    """
    # open_clip's CustomTextCLIP keeps the text tower in a module of its own.
    weights = {
        name.removeprefix("text."): tensor
        for name, tensor in tensors.items()
        if name.rpartition(".")[2] not in NOT_WEIGHTS
    }
    needed = {"visual.conv1.weight", "text_projection", "token_embedding.weight", "ln_final.weight"}
    if not needed <= weights.keys():
        missing = ", ".join(sorted(needed - weights.keys()))
        raise ConfigError(f"{path} does not hold a CLIP in OpenAI's format: {missing} is missing")
    return weights


def write_openai(
    path: Path, state_dict: Mapping[str, Tensor], dtype: torch.dtype = torch.float32
) -> None:
    """Write a state dict that `clip.load` opens, under a temporary name that then replaces `path`.

    In fp16, norms, embeddings and the temperature stay fp32, as in OpenAI's own archives.

    Raises:
        ConfigError: the folder cannot be written, or the disk is full.
    """
    tensors = _in_precision(state_dict, dtype)
    with replacing(path) as temporary:
        try:
            torch.save(tensors, temporary)
        except RuntimeError as error:
            raise OSError(str(error).splitlines()[0]) from error


def in_half(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The weights in fp32 as they are after OpenAI's loader has rounded its matrices to fp16."""
    return {name: tensor.float() for name, tensor in _in_precision(weights, torch.float16).items()}


def _in_precision(weights: Mapping[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    for name, tensor in weights.items():
        kept = not tensor.is_floating_point() or NORM_OR_EMBEDDING.search(name)
        # A copy, so that a slice of a larger storage does not bring all of it.
        tensors[name] = tensor.detach().to("cpu", None if kept else dtype, copy=True)
    return tensors
