"""What the two OpenAI variants share: architectures, towers, names of the weights."""

from __future__ import annotations

import enum
import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from twotower.checkpoint.clip import Architecture
from twotower.model_config import ALL, ModelConfig
from twotower.models.dual_encoder import DualEncoder, ModelBundle, Tower
from twotower.models.locking import keep_locked_parts_in_evaluation, lock_stages
from twotower.models.openai_tokenizer import OpenAITokenizer
from twotower.models.preprocess import ImageInput
from twotower.settings import ConfigError

# Radford et al. 2021, tables 19 and 20; `tiny` is ours, for CPUs: 8 million parameters, 6 of them
# the token embedding. A narrow ResNet, since on 1,500 pictures and equal CPU time it reached R@10
# 90 % of its training pictures where twice the width had 46 % and a ViT of patch 8 had not begun.
ARCHITECTURES = {
    "RN50": Architecture(
        embed_dim=1024, image_size=224, vision_layers=(3, 4, 6, 3), vision_width=64, patch_size=0
    ),
    "RN101": Architecture(
        embed_dim=512, image_size=224, vision_layers=(3, 4, 23, 3), vision_width=64, patch_size=0
    ),
    "RN50x4": Architecture(
        embed_dim=640,
        image_size=288,
        vision_layers=(4, 6, 10, 6),
        vision_width=80,
        patch_size=0,
        text_width=640,
    ),
    "RN50x16": Architecture(
        embed_dim=768,
        image_size=384,
        vision_layers=(6, 8, 18, 8),
        vision_width=96,
        patch_size=0,
        text_width=768,
    ),
    "RN50x64": Architecture(
        embed_dim=1024,
        image_size=448,
        vision_layers=(3, 15, 36, 10),
        vision_width=128,
        patch_size=0,
        text_width=1024,
    ),
    "ViT-B/32": Architecture(
        embed_dim=512, image_size=224, vision_layers=12, vision_width=768, patch_size=32
    ),
    "ViT-B/16": Architecture(
        embed_dim=512, image_size=224, vision_layers=12, vision_width=768, patch_size=16
    ),
    "ViT-L/14": Architecture(
        embed_dim=768,
        image_size=224,
        vision_layers=24,
        vision_width=1024,
        patch_size=14,
        text_width=768,
    ),
    "ViT-L/14@336px": Architecture(
        embed_dim=768,
        image_size=336,
        vision_layers=24,
        vision_width=1024,
        patch_size=14,
        text_width=768,
    ),
    "tiny": Architecture(
        embed_dim=128,
        image_size=64,
        vision_layers=(1, 1, 1, 1),
        vision_width=16,
        patch_size=0,
        context_length=32,
        text_width=128,
        text_layers=3,
    ),
}


class Activation(enum.Enum):
    """The nonlinearity of a CLIP's transformers."""

    auto = "auto"
    quick_gelu = "quick_gelu"
    gelu = "gelu"


def build_towers(
    architecture: Architecture,
    image_input: ImageInput,
    *,
    quick_gelu: bool,
    image_unlocked: int = ALL,
    text_unlocked: int = ALL,
) -> DualEncoder:
    """A dual encoder of an OpenAI architecture with OpenAI's random initialisation.

    The last stages that are unlocked begin with the projection, so that a locked tower's features
    are final and its head is the identity.

    Raises:
        ConfigError: an encoder has fewer stages than are to be unlocked.
    """
    from open_clip.model import CLIPTextCfg, CLIPVisionCfg, CustomTextCLIP

    clip = CustomTextCLIP(
        architecture.embed_dim,
        CLIPVisionCfg(
            layers=architecture.vision_layers,
            width=architecture.vision_width,
            head_width=architecture.vision_head_width,
            mlp_ratio=architecture.vision_mlp_ratio,
            patch_size=architecture.patch_size,
            image_size=architecture.image_size,
        ),
        CLIPTextCfg(
            context_length=architecture.context_length,
            vocab_size=architecture.vocab_size,
            width=architecture.text_width,
            heads=architecture.text_width // architecture.text_head_width,
            layers=architecture.text_layers,
            mlp_ratio=architecture.text_mlp_ratio,
        ),
        quick_gelu=quick_gelu,
    )
    clip.text.transformer.register_forward_pre_hook(_fit_mask, with_kwargs=True)
    image_trunk = nn.Sequential(image_input.norm(), clip.visual)
    for trunk, unlocked, side in (
        (image_trunk, image_unlocked, "image"),
        (clip.text, text_unlocked, "text"),
    ):
        lock_stages(trunk, unlocked, side)
        keep_locked_parts_in_evaluation(trunk)
    return DualEncoder(
        Tower(image_trunk, nn.Identity(), locked=image_unlocked == 0),
        Tower(clip.text, nn.Identity(), locked=text_unlocked == 0),
        clip.logit_scale,
    )


def _fit_mask(
    module: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Tensor, ...], dict[str, Any]]:
    """Cut the causal mask to the captions' length: open_clip's is that of the whole context."""
    length, mask = args[0].shape[1], kwargs.get("attn_mask")
    if mask is not None and mask.shape[-1] > length:
        kwargs = {**kwargs, "attn_mask": mask[:length, :length]}
    return args, kwargs


def build_bundle(
    config: ModelConfig, model: DualEncoder, architecture: Architecture, image_input: ImageInput
) -> ModelBundle:
    """The bundle around an OpenAI dual encoder; its assets build it again without its sources."""
    return ModelBundle(
        model=model,
        train_transform=image_input.train_transform(config),
        eval_transform=image_input.eval_transform(config),
        tokenizer=OpenAITokenizer(architecture.context_length),
        config=config,
        assets={
            "architecture": json.dumps(asdict(architecture)),
            "image_input": image_input.to_json(),
            "activation": "quick_gelu" if _uses_quick_gelu(model) else "gelu",
        },
    )


def architecture_of(assets: Mapping[str, str]) -> Architecture:
    """The architecture that `build_bundle` put into the assets."""
    values = json.loads(assets["architecture"])
    if isinstance(values["vision_layers"], list):
        values["vision_layers"] = tuple(values["vision_layers"])
    return Architecture(**values)


def check_architecture(architecture: Architecture, key: str) -> None:
    """Refuse sizes that OpenAI's code could not hold.

    Raises:
        ConfigError: the image does not divide into patches or strides, or the context is too short.
    """
    step = architecture.patch_size or 32
    if architecture.image_size % step or architecture.image_size < step:
        raise ConfigError(
            f"{key}.image_size must be a multiple of {step}, not {architecture.image_size}"
        )
    if architecture.context_length < 3:
        raise ConfigError(
            f"{key}.context_length must be at least 3 tokens, not {architecture.context_length}"
        )


def _uses_quick_gelu(model: DualEncoder) -> bool:
    return any(type(module).__name__ == "QuickGELU" for module in model.modules())


VISUAL, TEXT = "image_tower.trunk.1.", "text_tower.trunk."


def to_openai_names(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A dual encoder's weights under OpenAI's names."""
    renamed = {}
    for name, tensor in weights.items():
        if name.startswith(VISUAL):
            name = "visual." + name.removeprefix(VISUAL)
        renamed[name.removeprefix(TEXT)] = tensor
    return renamed


def from_openai_names(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights under OpenAI's names as a dual encoder's, in fp32."""
    renamed = {}
    for name, tensor in weights.items():
        if name.startswith("visual."):
            name = VISUAL + name.removeprefix("visual.")
        elif not name.startswith("logit_"):
            name = TEXT + name
        renamed[name] = tensor.float() if tensor.is_floating_point() else tensor
    return renamed


def load_openai_weights(
    model: DualEncoder, weights: Mapping[str, Tensor], source: Path | str
) -> None:
    """Put weights under OpenAI's names into a dual encoder.

    Raises:
        ConfigError: names or shapes do not fit.
    """
    named = from_openai_names(weights)
    logit_scale = named.get("logit_scale")
    if logit_scale is not None:
        named["logit_scale"] = logit_scale.reshape(())
    # Learned by a sigmoid loss, of no effect on features, and set anew by a loss that wants it.
    named.pop("logit_bias", None)
    try:
        missing, unexpected = model.load_state_dict(named, strict=False)
    except RuntimeError as error:
        raise ConfigError(
            f"the weights of {source} do not fit: {_first_mismatch(error)}"
        ) from error
    # Old archives do not count the batches; the count is used nowhere.
    missing = [name for name in missing if not name.endswith("num_batches_tracked")]
    if missing or unexpected:
        what = f"{missing[0]} is missing" if missing else f"{unexpected[0]} is not known"
        raise ConfigError(f"the weights of {source} do not fit: {what}")


def _first_mismatch(error: RuntimeError) -> str:
    return str(error).strip().splitlines()[-1].strip()
