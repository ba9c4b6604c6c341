"""`openai_pretrain`: an OpenAI architecture from random weights, initialised as OpenAI did."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from twotower.model_config import BatchNorm, ModelConfig
from twotower.models.dual_encoder import MODELS, ModelBundle
from twotower.models.openai_clip import (
    ARCHITECTURES,
    architecture_of,
    build_bundle,
    build_towers,
    check_architecture,
)
from twotower.models.preprocess import ImageInput
from twotower.settings import ConfigError, setting


@dataclass(kw_only=True)
class OpenaiPretrainConfig(ModelConfig):
    """An OpenAI architecture trained from scratch."""

    architecture: str = setting(
        "ViT-B/32", "OpenAI's name, from RN50 to ViT-L/14@336px, or tiny for CPUs"
    )
    image_size: int = setting(0, "side of the input in pixels; 0 is the architecture's own", ge=0)
    context_length: int = setting(
        0, "tokens a caption, start and end included; 0 is the architecture's own", ge=0
    )
    batch_norm: BatchNorm = setting(
        BatchNorm.local, "batch norms of a ResNet: local, or sync over the ranks"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.architecture not in ARCHITECTURES:
            raise ConfigError(
                f"model.architecture has no {self.architecture!r}; "
                f"it is one of {', '.join(ARCHITECTURES)}"
            )
        if self.batch_norm is BatchNorm.frozen:
            raise ConfigError(
                "model.batch_norm=frozen keeps running statistics, which random weights "
                "do not have; use local or sync"
            )


@MODELS.register("openai_pretrain", OpenaiPretrainConfig)
def build_openai_pretrain(
    config: OpenaiPretrainConfig, assets: Mapping[str, str] | None = None
) -> ModelBundle:
    """A CLIP with OpenAI's initialisation; the random numbers are torch's global ones.

    Raises:
        ConfigError: the image size does not divide by the patch size (ViT) or 32 (ResNet).
    """
    if assets is not None:
        architecture = architecture_of(assets)
        image_input = ImageInput.from_json(assets["image_input"])
    else:
        named = ARCHITECTURES[config.architecture]
        architecture = replace(
            named,
            image_size=config.image_size or named.image_size,
            context_length=config.context_length or named.context_length,
        )
        check_architecture(architecture, config.section)
        image_input = ImageInput(size=architecture.image_size)
    model = build_towers(architecture, image_input, quick_gelu=True)
    return build_bundle(config, model, architecture, image_input)
