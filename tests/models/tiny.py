"""Models of a few thousand parameters in the real formats."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from twotower.checkpoint.clip import Architecture
from twotower.model_config import BatchNorm
from twotower.models.bert_resnet import BertResnetConfig
from twotower.models.dual_encoder import DualEncoder, ModelBundle
from twotower.models.openai_clip import build_bundle, build_towers
from twotower.models.openai_finetune import OpenaiFinetuneConfig
from twotower.models.preprocess import ImageInput

VIT = Architecture(
    embed_dim=24,
    image_size=32,
    vision_layers=2,
    vision_width=64,
    patch_size=16,
    context_length=9,
    vocab_size=49408,
    text_width=64,
    text_layers=2,
)
RESNET = Architecture(
    embed_dim=24,
    image_size=64,
    vision_layers=(1, 2, 1, 1),
    vision_width=4,
    patch_size=0,
    context_length=9,
    vocab_size=49408,
    text_width=64,
    text_layers=1,
)
# Heads and hidden layers that OpenAI's format cannot tell.
ODD = replace(
    VIT, vision_head_width=16, text_head_width=32, vision_mlp_ratio=100 / 64, text_mlp_ratio=3.0
)
WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "a", "dog", "cat", "on", "the", "beach", "##s", "!"]


def make_clip(
    architecture: Architecture,
    seed: int = 0,
    *,
    quick_gelu: bool = True,
    image_input: ImageInput | None = None,
) -> DualEncoder:
    """A CLIP whose batch norms and biases are not trivial, so that every tensor matters."""
    torch.manual_seed(seed)
    image_input = image_input or ImageInput(size=architecture.image_size)
    model = build_towers(architecture, image_input, quick_gelu=quick_gelu).eval()
    for name, tensor in model.state_dict().items():
        if tensor.is_floating_point() and name != "logit_scale":
            noise = torch.rand_like(tensor) if "running_var" in name else torch.randn_like(tensor)
            tensor.add_(0.1 * noise)
    return model


def clip_bundle(
    architecture: Architecture, *, quick_gelu: bool = True, **pixels: Any
) -> ModelBundle:
    """`make_clip` as a fine-tune has it; `pixels` are fields of `ImageInput`."""
    image_input = ImageInput(size=architecture.image_size, **pixels)
    model = make_clip(architecture, quick_gelu=quick_gelu, image_input=image_input)
    return build_bundle(OpenaiFinetuneConfig(), model, architecture, image_input)


def write_bert(folder: Path, *, pad_token: str | None = "[PAD]", width: int = 32) -> Path:
    """A random BertModel and its tokenizer in Hugging Face's folder format."""
    from tokenizers import BertWordPieceTokenizer
    from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(WORDS),
        hidden_size=width,
        num_hidden_layers=3,
        num_attention_heads=2,
        intermediate_size=48,
        max_position_embeddings=40,
    )
    BertModel(config).save_pretrained(folder)
    words = BertWordPieceTokenizer({word: i for i, word in enumerate(WORDS)})
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words._tokenizer,
        unk_token="[UNK]",
        pad_token=pad_token,
        cls_token="[CLS]",
        sep_token="[SEP]",
    )
    tokenizer.save_pretrained(folder)
    return folder


def bert_config(folder: Path, **fields: object) -> BertResnetConfig:
    """A small `bert_resnet` around a folder of `write_bert`, with a random image tower."""
    values: dict[str, object] = {
        "text_encoder": str(folder),
        "image_encoder": "test_resnet",
        "image_weights": "none",
        "image_size": 32,
        "text_length": 12,
        "embed_dim": 20,
        "batch_norm": BatchNorm.local,
        **fields,
    }
    return BertResnetConfig(**values)  # type: ignore[arg-type]
