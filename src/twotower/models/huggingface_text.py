"""Text trunks from Hugging Face: any encoder of the hub or of a local folder, and its tokenizer."""

from __future__ import annotations

import enum
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from twotower.checkpoint.download import reach_hub
from twotower.settings import ConfigError


class Pooling(enum.Enum):
    """How the features of a caption's tokens become one vector."""

    cls = "cls"
    mean = "mean"


@dataclass(frozen=True, kw_only=True)
class HuggingFaceTokenizer:
    """Captions -> ids (N, context_length) by a `tokenizer.json`, cut and padded to that length.

    Attributes:
        json: the text of `tokenizer.json`, so that a checkpoint carries its vocabulary.
        pad_id, pad_token: what fills up short captions.
    """

    json: str
    pad_id: int
    pad_token: str
    context_length: int
    _tokenizer: Any = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        from tokenizers import Tokenizer

        tokenizer = Tokenizer.from_str(self.json)
        tokenizer.enable_truncation(self.context_length)
        tokenizer.enable_padding(
            length=self.context_length, pad_id=self.pad_id, pad_token=self.pad_token
        )
        object.__setattr__(self, "_tokenizer", tokenizer)

    def __call__(self, texts: Sequence[str]) -> Tensor:
        if not texts:
            return torch.zeros(0, self.context_length, dtype=torch.int64)
        return torch.tensor(
            [encoding.ids for encoding in self._tokenizer.encode_batch(list(texts))]
        )

    def to_json(self) -> str:
        """A `tokenizer.json` that cuts and pads as this does, for `tokenizers.Tokenizer`."""
        text: str = self._tokenizer.to_str()
        return text


class HuggingFaceText(nn.Module):
    """Token ids (B, L) -> features (B, width): an encoder's last layer, pooled."""

    def __init__(self, encoder: nn.Module, pooling: Pooling, pad_id: int) -> None:
        super().__init__()
        self.encoder = encoder
        self.pooling = pooling
        self.pad_id = pad_id

    def forward(self, tokens: Tensor) -> Tensor:
        mask = tokens != self.pad_id
        output = self.encoder(input_ids=tokens, attention_mask=mask.to(torch.int64))
        features: Tensor = output.last_hidden_state  # (B, L, width)
        if self.pooling is Pooling.cls:
            return features[:, 0]
        weight = mask.unsqueeze(-1).to(features.dtype)
        return (features * weight).sum(1) / weight.sum(1).clamp(min=1)

    def extra_repr(self) -> str:
        return f"pooling={self.pooling.name}, pad_id={self.pad_id}"

    def stages(self) -> list[list[nn.Parameter]]:
        """The parameters in the order of the forward pass: embeddings, then one stage a layer."""
        lists = [part for part in self.encoder.modules() if isinstance(part, nn.ModuleList)]
        layers = max(lists, key=lambda part: sum(p.numel() for p in part.parameters()))
        inside = {id(p) for p in layers.parameters()}
        stages: list[list[nn.Parameter]] = [[], *([*layer.parameters()] for layer in layers)]
        after = False
        for parameter in self.encoder.parameters():
            after = after or id(parameter) in inside
            if id(parameter) not in inside:
                stages[-1 if after else 0].append(parameter)
        return stages


def load_text(
    name: str, pooling: Pooling, length: int
) -> tuple[HuggingFaceText, HuggingFaceTokenizer, dict[str, str]]:
    """A pretrained text trunk, its tokenizer, and the assets that `rebuild_text` needs.

    Code that a folder brings (`auto_map`) is never run.

    Raises:
        ConfigError: no such folder, no network, no encoder, no padding token, or too long.
    """
    from transformers import AutoModel, AutoTokenizer
    from transformers.utils import logging as transformers_logging

    if not _is_local(name):
        reach_hub("model.text_encoder", name)
    transformers_logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    try:
        encoder, info = AutoModel.from_pretrained(
            name, dtype=torch.float32, output_loading_info=True, trust_remote_code=False
        )
        fast = AutoTokenizer.from_pretrained(name, trust_remote_code=False)
    # transformers raises OSError, ValueError, KeyError, ImportError and errors of its parts alike.
    except Exception as error:
        if "trust_remote_code" in str(error):
            raise ConfigError(
                f"model.text_encoder={name} brings code of its own (auto_map), which twotower "
                "never runs; choose an encoder that transformers knows"
            ) from error
        raise ConfigError(
            f"model.text_encoder={name} cannot be loaded: {_reason(error)}"
        ) from error
    lost = [key for key in info["missing_keys"] if not key.startswith("pooler.")]
    if lost:
        raise ConfigError(
            f"model.text_encoder={name} has no weights for {len(lost)} of its tensors ({lost[0]}); "
            "its files do not fit its config.json"
        )
    _check_encoder(name, encoder, fast, length)
    text_config = json.loads(encoder.config.to_json_string(use_diff=False))
    text_config.pop("_name_or_path", None)  # a folder of this machine, which nobody else has
    assets = {
        "text_config": json.dumps(text_config),
        "tokenizer": fast.backend_tokenizer.to_str(),
        "padding": json.dumps({"id": fast.pad_token_id, "token": fast.pad_token}),
    }
    tokenizer = _tokenizer(assets, length)
    return _trunk(encoder, pooling, tokenizer.pad_id), tokenizer, assets


def rebuild_text(
    assets: Mapping[str, str], pooling: Pooling, length: int
) -> tuple[HuggingFaceText, HuggingFaceTokenizer]:
    """The trunk with random weights, and its tokenizer, from the assets alone."""
    from transformers import AutoConfig, AutoModel

    config = AutoConfig.for_model(**json.loads(assets["text_config"]))
    encoder = AutoModel.from_config(  # type: ignore[no-untyped-call]
        config, dtype=torch.float32, trust_remote_code=False
    )
    tokenizer = _tokenizer(assets, length)
    return _trunk(encoder, pooling, tokenizer.pad_id), tokenizer


def _tokenizer(assets: Mapping[str, str], length: int) -> HuggingFaceTokenizer:
    padding = json.loads(assets["padding"])
    return HuggingFaceTokenizer(
        json=assets["tokenizer"],
        pad_id=padding["id"],
        pad_token=padding["token"],
        context_length=length,
    )


def _trunk(encoder: nn.Module, pooling: Pooling, pad_id: int) -> HuggingFaceText:
    if getattr(encoder, "pooler", None) is not None:
        # Trained for another task and not part of the features; DDP would wait for its gradients.
        encoder.pooler = None  # type: ignore[assignment]
    return HuggingFaceText(encoder, pooling, pad_id)


def _is_local(name: str) -> bool:
    """Whether a name is a folder; refuses what can only be a path and is not there."""
    path = Path(name).expanduser()
    if path.is_dir():
        return True
    first = Path(path.parts[0]) if path.parts else path
    looks_like_path = name.count("/") > 1 or name.startswith((".", "~", "/")) or first.is_dir()
    if looks_like_path or os.path.exists(path):
        raise ConfigError(
            f"model.text_encoder: no such folder: {name}; `twotower prepare backbones` lays out "
            "the packaged encoders, or give a name of the Hugging Face hub"
        )
    return False


def _check_encoder(name: str, encoder: Any, fast: Any, length: int) -> None:
    config = encoder.config
    problem = ""
    if getattr(config, "is_encoder_decoder", False):
        problem = "is an encoder-decoder; choose an encoder such as bert-base-uncased"
    elif not hasattr(fast, "backend_tokenizer"):
        problem = "has no fast tokenizer (tokenizer.json), which twotower needs"
    elif fast.pad_token_id is None:
        problem = "has a tokenizer without a padding token; choose an encoder that has one"
    if problem:
        raise ConfigError(f"model.text_encoder={name} {problem}")
    # RoBERTa counts positions from the padding id on, so two of its 514 are never used.
    offset = (config.pad_token_id or 0) + 1 if "roberta" in config.model_type else 0
    longest = getattr(config, "max_position_embeddings", None)
    if longest is not None and 0 < longest - offset < length:
        raise ConfigError(
            f"model.text_length is {length}, but {name} has positions for {longest - offset} tokens"
        )


def _reason(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0].rstrip(". ") if lines else type(error).__name__
