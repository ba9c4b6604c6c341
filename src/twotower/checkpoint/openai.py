"""OpenAI's CLIP checkpoints: reading their files, and writing what `clip.load` opens.

Radford et al. 2021; the names of the tensors and what is inferred from them follow
`clip/model.py` of github.com/openai/CLIP (MIT).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from twotower.checkpoint.atomic import replacing
from twotower.checkpoint.torchscript import ForbiddenGlobal, archive_root, read_torchscript
from twotower.settings import ConfigError

NOT_WEIGHTS = ("input_resolution", "context_length", "vocab_size", "attn_mask")
HEAD_WIDTH = 64  # OpenAI's models have one attention head per 64 channels, and infer the heads so
NORM_OR_EMBEDDING = re.compile(
    r"(^|\.)(ln_|bn\d|downsample\.1|token_embedding|positional_embedding|class_embedding|logit_scale)"
)


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """What a CLIP of OpenAI's is made of.

    Attributes:
        embed_dim: dimension D of the joint space.
        image_size: side of the input in pixels.
        vision_layers: blocks of the vision transformer, or of each of ModifiedResNet's four stages.
        vision_width: channels of the vision transformer, or of ModifiedResNet's stem.
        patch_size: side of a patch in pixels; 0 for a ModifiedResNet.
        context_length, vocab_size, text_width, text_layers: the text transformer.
    """

    embed_dim: int
    image_size: int
    vision_layers: int | tuple[int, int, int, int]
    vision_width: int
    patch_size: int
    context_length: int = 77
    vocab_size: int = 49408
    text_width: int = 512
    text_layers: int = 12


def _wrong_file(path: Path, error: BaseException) -> ConfigError:
    planted = re.search(r"GLOBAL ([\w.]+)", str(error))
    if isinstance(error, ForbiddenGlobal) or planted:
        what = str(error) if planted is None else planted[1]
        return ConfigError(
            f"{path} was refused: it asks to run {what}, which no CLIP checkpoint needs"
        )
    return ConfigError(
        f"{path} cannot be read as OpenAI's format: it is truncated, or another kind of file"
    )


def read_openai(path: Path) -> dict[str, Tensor]:
    """The weights of a CLIP by OpenAI's names, from a TorchScript archive or a plain state dict.

    Nothing that the file holds is run. A state dict may lie under "state_dict", and its names
    may begin with "module." (checkpoints of training programs).

    Raises:
        ConfigError: missing, truncated, no CLIP of OpenAI's kind, or asking for more than tensors.
    """
    if not path.is_file():
        kind = "is a folder" if path.is_dir() else "does not exist"
        raise ConfigError(f"{path} {kind}; give a .pt file in OpenAI's format")
    try:
        root = archive_root(path)
        if root is not None:
            loaded: Any = read_torchscript(path, root)
        else:
            loaded = torch.load(path, map_location="cpu", weights_only=True)
    # A damaged file can make an unpickler raise nearly anything; each means the same to the user.
    except Exception as error:
        raise _wrong_file(path, error) from error
    if isinstance(loaded, dict) and isinstance(loaded.get("state_dict"), dict):
        loaded = loaded["state_dict"]
    return clip_weights(loaded, path)


def clip_weights(loaded: Any, path: Path) -> dict[str, Tensor]:
    """Only the weights out of a loaded state dict, with OpenAI's names.

    Raises:
        ConfigError: it is not the state dict of a CLIP of OpenAI's kind.
    """
    tensors = loaded if isinstance(loaded, Mapping) else {}
    weights = {
        name.removeprefix("module."): tensor
        for name, tensor in tensors.items()
        if isinstance(tensor, Tensor) and name.rpartition(".")[2] not in NOT_WEIGHTS
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
    tensors: dict[str, Tensor] = {}
    for name, tensor in state_dict.items():
        kept = not tensor.is_floating_point() or NORM_OR_EMBEDDING.search(name)
        # A copy, so that a slice of a larger storage does not bring all of it.
        tensors[name] = tensor.detach().to("cpu", None if kept else dtype, copy=True)
    with replacing(path) as temporary:
        try:
            torch.save(tensors, temporary)
        except RuntimeError as error:
            raise OSError(str(error).splitlines()[0]) from error


def _count(weights: Mapping[str, Tensor], pattern: str) -> int:
    return len({found[1] for name in weights if (found := re.match(pattern, name))})


def infer_architecture(weights: Mapping[str, Tensor]) -> Architecture:
    """The architecture that weights belong to, inferred as `clip.build_model` does.

    Raises:
        ConfigError: the shapes are not those of a CLIP of OpenAI's kind.
    """
    try:
        vision_width = weights["visual.conv1.weight"].shape[0]
        layers: int | tuple[int, int, int, int]
        if "visual.proj" in weights:
            patch_size = weights["visual.conv1.weight"].shape[-1]
            positions = weights["visual.positional_embedding"].shape[0]
            layers = _count(weights, r"visual\.transformer\.resblocks\.(\d+)\.attn\.in_proj_weight")
            image_size = patch_size * round((positions - 1) ** 0.5)
        else:
            vision_width = weights["visual.layer1.0.conv1.weight"].shape[0]
            patch_size = 0
            positions = weights["visual.attnpool.positional_embedding"].shape[0]
            stages = [_count(weights, rf"visual\.layer{stage}\.(\d+)") for stage in (1, 2, 3, 4)]
            layers = (stages[0], stages[1], stages[2], stages[3])
            image_size = 32 * round((positions - 1) ** 0.5)
        return Architecture(
            embed_dim=weights["text_projection"].shape[1],
            image_size=image_size,
            vision_layers=layers,
            vision_width=vision_width,
            patch_size=patch_size,
            context_length=weights["positional_embedding"].shape[0],
            vocab_size=weights["token_embedding.weight"].shape[0],
            text_width=weights["ln_final.weight"].shape[0],
            text_layers=_count(weights, r"transformer\.resblocks\.(\d+)"),
        )
    except (KeyError, IndexError) as error:
        raise ConfigError(
            f"the weights are not those of a CLIP of OpenAI's kind: {error}"
        ) from error
