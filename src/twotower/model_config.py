"""The model section of the config: what every variant, and every pretrained one, shares."""

from __future__ import annotations

import enum
from dataclasses import dataclass
from typing import ClassVar

from twotower.settings import Choice, ConfigError, setting

ALL = -1  # every stage of an encoder is trained


class BatchNorm(enum.Enum):
    """What the batch norms of a trainable tower normalise by."""

    frozen = "frozen"
    sync = "sync"
    local = "local"


@dataclass(kw_only=True)
class ModelConfig(Choice):
    """What every variant shares; a variant's own fields are in `models/<name>.py`."""

    section: ClassVar[str] = "model"

    batch_norm: BatchNorm = setting(
        BatchNorm.frozen,
        "batch norms of a trained tower: frozen (statistics kept), sync (over ranks) or local",
    )
    crop_min_scale: float = setting(
        0.9, "smallest share of a picture's area that a random training crop keeps", gt=0, le=1
    )
    flip: bool = setting(False, "mirror every second training picture")
    exact: bool = setting(
        False,
        "decode JPEGs in full, for the pixels of OpenAI's transform; else large ones to at least "
        "twice the tower's input, which is quicker",
    )


@dataclass(kw_only=True)
class PretrainedConfig(ModelConfig):
    """What the variants with pretrained encoders share: what of them is trained, and how."""

    image_unlocked_stages: int = setting(
        ALL, "last stages of the image encoder that are trained; -1 is all, 0 none", ge=ALL
    )
    text_unlocked_stages: int = setting(
        ALL, "last stages of the text encoder that are trained; -1 is all, 0 none", ge=ALL
    )
    lora_rank: int = setting(
        0,
        "rank of adapters (LoRA) that are trained in the unlocked stages' place; 0 trains those",
        ge=0,
    )
    lora_alpha: int = setting(16, "adapters count alpha / rank times", ge=1)
    lora_dropout: float = setting(0.0, "dropout in front of the adapters", ge=0, lt=1)
    lora_targets: list[str] = setting(
        [],
        "ends of the names of layers that get adapters; empty is every linear layer and 1x1 "
        "convolution (of OpenAI's transformers, whose attention is fused: those of the MLPs)",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.lora_rank and self.image_unlocked_stages == self.text_unlocked_stages == 0:
            raise ConfigError(
                f"model.lora_rank={self.lora_rank} adapts unlocked stages, but both encoders are "
                "locked; use model.image_unlocked_stages=-1 or model.text_unlocked_stages=-1"
            )
