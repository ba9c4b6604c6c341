from __future__ import annotations

import pytest
import torch

from twotower.model_config import BatchNorm
from twotower.models.dual_encoder import MODELS
from twotower.models.openai_pretrain import OpenaiPretrainConfig
from twotower.settings import ConfigError


def test_sizes_are_the_configs_and_the_weights_are_the_seeds() -> None:
    config = OpenaiPretrainConfig(architecture="tiny", image_size=96, context_length=12)
    torch.manual_seed(5)
    bundle = MODELS.build(config)
    torch.manual_seed(5)
    again = MODELS.build(config)
    for (name, one), (_, two) in zip(
        bundle.model.named_parameters(), again.model.named_parameters(), strict=True
    ):
        assert torch.equal(one, two), name
    tokens = bundle.tokenizer(["a dog"])
    assert tokens.shape == (1, 12)
    images = torch.randint(0, 256, (2, 3, 96, 96), dtype=torch.uint8)
    output = bundle.model(images, tokens)
    assert output.image_features.shape == (2, 128) and output.text_features.shape == (1, 128)
    assert all(parameter.requires_grad for parameter in bundle.model.parameters())


def test_tiny_has_a_few_million_parameters_and_learns_in_both_towers() -> None:
    torch.manual_seed(0)
    bundle = MODELS.build(OpenaiPretrainConfig(architecture="tiny"))
    assert 1e6 < sum(parameter.numel() for parameter in bundle.model.parameters()) < 15e6
    images = torch.randint(0, 256, (4, 3, 64, 64), dtype=torch.uint8)
    output = bundle.model(images, bundle.tokenizer(["a", "b", "c d", "e"]))
    logits = output.logit_scale * output.image_features @ output.text_features.T
    torch.nn.functional.cross_entropy(logits, torch.arange(4)).backward()
    dead = [
        name
        for name, parameter in bundle.model.named_parameters()
        if parameter.grad is None or not parameter.grad.isfinite().all()
    ]
    assert dead == []


def test_settings_that_cannot_be_get_a_sentence() -> None:
    with pytest.raises(ConfigError, match=r"model.architecture has no 'RN5'; it is one of RN50, "):
        OpenaiPretrainConfig(architecture="RN5")
    with pytest.raises(ConfigError, match="model.batch_norm=frozen keeps running statistics"):
        OpenaiPretrainConfig(batch_norm=BatchNorm.frozen)
    for config, sentence in [
        (OpenaiPretrainConfig(architecture="tiny", image_size=50), "multiple of 32, not 50"),
        (OpenaiPretrainConfig(architecture="ViT-L/14", image_size=32), "multiple of 14, not 32"),
        (OpenaiPretrainConfig(architecture="tiny", context_length=2), "at least 3 tokens, not 2"),
    ]:
        with pytest.raises(ConfigError, match=sentence):
            MODELS.build(config)
