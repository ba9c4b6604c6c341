"""Every encoder's stages hold each of its parameters once, in the order of the forward pass."""

from __future__ import annotations

from pathlib import Path

import pytest
from torch import nn

from tests.models.tiny import RESNET, VIT, bert_config, make_clip
from twotower.models.dual_encoder import MODELS
from twotower.models.stages import encoder_stages
from twotower.settings import ConfigError


def named(trunk: nn.Module) -> list[list[str]]:
    names = {parameter: name for name, parameter in trunk.named_parameters()}
    stages = [[names[p] for p in stage] for stage in encoder_stages(trunk, "none")]
    assert sorted(name for stage in stages for name in stage) == sorted(names.values())
    return stages


def test_openais_vision_transformer() -> None:
    first, *blocks, last = named(make_clip(VIT).image_tower.trunk)  # type: ignore[arg-type]
    assert {name.split(".")[1] for name in first} == {
        "class_embedding",
        "positional_embedding",
        "conv1",
        "ln_pre",
    }
    assert len(blocks) == 2
    for number, block in enumerate(blocks):
        assert all(name.startswith(f"1.transformer.resblocks.{number}.") for name in block)
        assert len(block) == 12
    assert last == ["1.proj", "1.ln_post.weight", "1.ln_post.bias"]


def test_openais_resnet() -> None:
    first, *layers, last = named(make_clip(RESNET).image_tower.trunk)  # type: ignore[arg-type]
    assert {name.split(".")[1] for name in first} == {
        "conv1",
        "bn1",
        "conv2",
        "bn2",
        "conv3",
        "bn3",
    }
    assert len(layers) == 4
    for number, layer in enumerate(layers, 1):
        assert all(name.startswith(f"1.layer{number}.") for name in layer)
    assert all(name.startswith("1.attnpool.") for name in last)


def test_openais_text_transformer() -> None:
    first, *blocks, last = named(make_clip(VIT).text_tower.trunk)  # type: ignore[arg-type]
    assert first == ["positional_embedding", "token_embedding.weight"]
    assert len(blocks) == 2
    assert last == ["text_projection", "ln_final.weight", "ln_final.bias"]


@pytest.mark.parametrize(
    ("encoder", "size", "count"), [("test_resnet", 32, 5), ("test_vit", 64, 7)]
)
def test_timm_and_hugging_face(bert: Path, encoder: str, size: int, count: int) -> None:
    model = MODELS.build(bert_config(bert, image_encoder=encoder, image_size=size)).model
    assert len(named(model.image_tower.trunk)) == count  # type: ignore[arg-type]
    embeddings, *layers = named(model.text_tower.trunk)  # type: ignore[arg-type]
    assert all(".embeddings." in name for name in embeddings) and len(layers) == 3


def test_an_encoder_without_stages_gets_the_sentence() -> None:
    with pytest.raises(ConfigError, match="^no stages here$"):
        encoder_stages(nn.Sequential(nn.Flatten(), nn.Linear(2, 2)), "no stages here")
