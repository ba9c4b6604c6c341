"""`bert_resnet`: any Hugging Face text encoder and any timm image encoder, joined by heads."""

from __future__ import annotations

import enum
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import nn

from twotower.model_config import BatchNorm, PretrainedConfig
from twotower.models.dual_encoder import MODELS, DualEncoder, ModelBundle, Tower
from twotower.models.huggingface_text import Pooling, load_text, rebuild_text
from twotower.models.locking import (
    keep_locked_parts_in_evaluation,
    lock_stages,
    trainable_batch_norms,
)
from twotower.models.lora import add_adapters
from twotower.models.preprocess import ImageInput, rgb
from twotower.models.timm_image import RANDOM, create_trunk, feature_width, load_trunk, resize_input
from twotower.settings import ConfigError, setting


class HeadKind(enum.Enum):
    """What projects a trunk's features into the joint space."""

    linear = "linear"
    mlp = "mlp"


@dataclass(kw_only=True)
class BertResnetConfig(PretrainedConfig):
    """Two pretrained encoders of any kind, and the heads between them."""

    text_encoder: str = setting(
        "bert-base-uncased", "a name of the Hugging Face hub, or a local folder in its format"
    )
    image_encoder: str = setting("resnet50", "any timm model by name")
    image_weights: str = setting(
        "", "empty: timm's own from the hub; none: random; or a local .safetensors or .pth file"
    )
    image_size: int = setting(0, "side of the input in pixels; 0 is the weights' own", ge=0)
    train_image_size: int = setting(
        0,
        "side of training pictures in pixels, where crops show things larger than whole pictures "
        "do; 0 is that of the input",
        ge=0,
    )
    image_mean: list[float] = setting(
        [], "mean of red, green, blue where white is 1; empty is the weights' own"
    )
    image_std: list[float] = setting(
        [], "deviation of red, green, blue where white is 1; empty is the weights' own", gt=0
    )
    text_length: int = setting(64, "tokens a caption, cut and padded", ge=3)
    pooling: Pooling = setting(Pooling.mean, "a caption's vector: mean over its tokens, or cls")
    embed_dim: int = setting(512, "dimension of the joint space", ge=1)
    head: HeadKind = setting(HeadKind.linear, "projection heads: linear or mlp")
    head_width: int = setting(1024, "hidden width of an mlp head", ge=1)
    head_dropout: float = setting(0.0, "dropout inside the heads", ge=0, lt=1)

    def __post_init__(self) -> None:
        super().__post_init__()
        for key in ("image_mean", "image_std"):
            values = getattr(self, key)
            if len(values) not in (0, 3):
                raise ConfigError(f"model.{key} must be three numbers or [], not {values}")


@MODELS.register("bert_resnet", BertResnetConfig)
def build_bert_resnet(
    config: BertResnetConfig, assets: Mapping[str, str] | None = None
) -> ModelBundle:
    """A dual encoder from two pretrained trunks; the heads are random.

    Raises:
        ConfigError: a trunk cannot be found or loaded, or a setting does not fit it.
    """
    if assets is None:
        text_trunk, tokenizer, kept = load_text(
            config.text_encoder, config.pooling, config.text_length
        )
        image_trunk, image_input = load_trunk(config.image_encoder, config.image_weights)
        image_input = _as_configured(image_input, config)
        kept["image_input"] = image_input.to_json()
    else:
        kept = dict(assets)
        text_trunk, tokenizer = rebuild_text(kept, config.pooling, config.text_length)
        image_trunk = create_trunk(config.image_encoder)
        image_input = ImageInput.from_json(kept["image_input"])
    image_width = resize_input(image_trunk, image_input.size)
    train_input = _train_input(image_trunk, image_input, config)
    text_width = int(text_trunk.encoder.config.hidden_size)  # type: ignore[union-attr, arg-type]
    _lock(image_trunk, text_trunk, config)
    model = DualEncoder(
        Tower(
            nn.Sequential(image_input.norm(), image_trunk),
            build_head(image_width, config),
            locked=config.image_unlocked_stages == 0,
        ),
        Tower(
            text_trunk,
            build_head(text_width, config),
            locked=config.text_unlocked_stages == 0,
        ),
    )
    pictures = torch.zeros(1, 3, image_input.size, image_input.size)
    add_adapters(model, config, pictures, tokenizer(["a"]))
    return ModelBundle(
        model=model,
        train_transform=train_input.train_transform(config),
        eval_transform=image_input.eval_transform(config),
        tokenizer=tokenizer,
        config=config,
        assets=kept,
    )


def build_head(width: int, config: BertResnetConfig) -> nn.Module:
    """Features (B, width) -> the joint space (B, embed_dim).

    The layer norm in front lets trunks of very different scales train at one learning rate.
    """
    if config.head is HeadKind.linear:
        return nn.Sequential(
            nn.LayerNorm(width),
            nn.Dropout(config.head_dropout),
            nn.Linear(width, config.embed_dim, bias=False),
        )
    return nn.Sequential(
        nn.LayerNorm(width),
        nn.Linear(width, config.head_width),
        nn.GELU(),
        nn.Dropout(config.head_dropout),
        nn.Linear(config.head_width, config.embed_dim),
    )


def _as_configured(image_input: ImageInput, config: BertResnetConfig) -> ImageInput:
    return replace(
        image_input,
        size=config.image_size or image_input.size,
        mean=rgb(config.image_mean) if config.image_mean else image_input.mean,
        std=rgb(config.image_std) if config.image_std else image_input.std,
    )


def _train_input(trunk: nn.Module, image_input: ImageInput, config: BertResnetConfig) -> ImageInput:
    """What training pictures become: smaller than those of evaluation, if that is asked for.

    Random crops enlarge what they show, so an encoder does best on whole pictures of some more
    pixels than it was trained with (Touvron et al. 2019, arXiv:1906.06423).

    Raises:
        ConfigError: the encoder takes pictures of one size alone.
    """
    size = config.train_image_size or image_input.size
    if size != image_input.size:
        feature_width(trunk, size, "model.train_image_size")
    return replace(image_input, size=size)


def _lock(image_trunk: nn.Module, text_trunk: nn.Module, config: BertResnetConfig) -> None:
    """Lock what the config says; fully locked trunks are left to `Tower`."""
    lock_stages(image_trunk, config.image_unlocked_stages, "image")
    lock_stages(text_trunk, config.text_unlocked_stages, "text")
    for trunk in (image_trunk, text_trunk):
        keep_locked_parts_in_evaluation(trunk)
    from_random = config.image_weights == RANDOM and config.image_unlocked_stages != 0
    if from_random and config.batch_norm is BatchNorm.frozen and trainable_batch_norms(image_trunk):
        raise ConfigError(
            "model.batch_norm=frozen keeps running statistics, which random weights do not have; "
            "with model.image_weights=none use model.batch_norm=local or sync"
        )
