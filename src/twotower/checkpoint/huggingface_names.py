"""The names of a CLIP's tensors in Hugging Face's `CLIPModel`, to OpenAI's and back."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from twotower.settings import ConfigError

# Theirs -> OpenAI's: what a name begins with.
TOWERS = {
    "vision_model.embeddings.class_embedding": "visual.class_embedding",
    "vision_model.embeddings.patch_embedding.": "visual.conv1.",
    "vision_model.embeddings.position_embedding.weight": "visual.positional_embedding",
    "vision_model.pre_layrnorm.": "visual.ln_pre.",
    "vision_model.post_layernorm.": "visual.ln_post.",
    "vision_model.encoder.layers.": "visual.transformer.resblocks.",
    "text_model.embeddings.token_embedding.": "token_embedding.",
    "text_model.embeddings.position_embedding.weight": "positional_embedding",
    "text_model.final_layer_norm.": "ln_final.",
    "text_model.encoder.layers.": "transformer.resblocks.",
}
# What stands in the middle.
PARTS = {
    ".self_attn.out_proj.": ".attn.out_proj.",
    ".layer_norm1.": ".ln_1.",
    ".layer_norm2.": ".ln_2.",
    ".mlp.fc1.": ".mlp.c_fc.",
    ".mlp.fc2.": ".mlp.c_proj.",
}
TRANSPOSED = {
    "visual_projection.weight": "visual.proj",
    "text_projection.weight": "text_projection",
}
ATTENTION = re.compile(r"(.+)\.self_attn\.([qkv])_proj\.(weight|bias)")
JOINED = re.compile(r"(.+)\.attn\.in_proj_(weight|bias)")


def from_huggingface(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """OpenAI's names; queries, keys and values become the one matrix of OpenAI's attention.

    Raises:
        ConfigError: an attention lacks one of the three.
    """
    renamed: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        attention = ATTENTION.fullmatch(name)
        if attention is not None:
            block, _, kind = attention.groups()
            joined = f"{_rename(block + '.', TOWERS)}attn.in_proj_{kind}"
            if joined not in renamed:
                renamed[joined] = _join(tensors, block, kind)
        elif name in TRANSPOSED:
            renamed[TRANSPOSED[name]] = tensor.T.contiguous()
        # Old files hold the numbers of the positions too.
        elif not name.endswith(".position_ids"):
            renamed[_rename(name, TOWERS, PARTS)] = tensor
    return renamed


def to_huggingface(weights: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """Their names, in fp32; a bias of the logits, which `CLIPModel` does not have, is left out."""
    towers, parts, transposed = ({o: t for t, o in d.items()} for d in (TOWERS, PARTS, TRANSPOSED))
    for name, tensor in weights.items():
        joined = JOINED.fullmatch(name)
        if joined is not None:
            block = _rename(joined[1] + ".", towers)
            for part, third in zip("qkv", tensor.float().chunk(3), strict=True):
                yield f"{block}self_attn.{part}_proj.{joined[2]}", third
        elif name in transposed:
            yield transposed[name], tensor.float().T
        elif name != "logit_bias":
            yield _rename(name, towers, parts), tensor.float()


def _join(tensors: Mapping[str, Tensor], block: str, kind: str) -> Tensor:
    names = [f"{block}.self_attn.{part}_proj.{kind}" for part in "qkv"]
    missing = [name for name in names if name not in tensors]
    if missing:
        raise ConfigError(f"the weights have no {missing[0]}")
    return torch.cat([tensors[name] for name in names])


def _rename(name: str, starts: Mapping[str, str], parts: Mapping[str, str] | None = None) -> str:
    for old, new in starts.items():
        if name.startswith(old):
            name = new + name.removeprefix(old)
            break
    for old, new in (parts or {}).items():
        name = name.replace(old, new)
    return name
