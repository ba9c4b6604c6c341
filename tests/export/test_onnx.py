from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import onnxruntime
import pytest
import torch
from tokenizers import Tokenizer

from tests.export.parts import TEXTS, export, features, random_images
from tests.models.tiny import RESNET, VIT, bert_config, clip_bundle
from twotower.export import onnx
from twotower.export.probe import make_probe
from twotower.export.tokenizers import tokenizer_json
from twotower.models.bert_resnet import HeadKind
from twotower.models.dual_encoder import MODELS, ModelBundle
from twotower.models.huggingface_text import Pooling
from twotower.settings import ConfigError

BUNDLES = ["resnet", "bert locked", "bert mlp"]


def build(name: str, bert: Path) -> ModelBundle:
    """Towers of the three variants; OpenAI's vision transformer is in `test_formats`."""
    if name == "bert locked":
        config = bert_config(bert, image_unlocked_stages=0, text_unlocked_stages=1)
        return MODELS.build(config)
    if name == "bert mlp":
        config = bert_config(bert, head=HeadKind.mlp, pooling=Pooling.cls, image_encoder="test_vit")
        return MODELS.build(config)
    return clip_bundle(RESNET)


@pytest.mark.parametrize("name", BUNDLES)
def test_the_graphs_take_batches_of_any_size_and_give_equal_features(
    name: str, bert: Path, tmp_path: Path
) -> None:
    bundle = build(name, bert)
    out = tmp_path / "out"
    told = export(bundle, "onnx", out)
    assert "features equal on 3 pictures" in told
    assert f"onnxruntime.InferenceSession('{out}/image.onnx')" in told
    about = json.loads((out / "model.json").read_text())
    tokenizer = Tokenizer.from_file(str(out / "tokenizer.json"))
    tokens = torch.tensor([found.ids for found in tokenizer.encode_batch(TEXTS)])
    assert tokens.shape == (3, about["context_length"])
    images = random_images(bundle)
    assert images.shape[-1] == about["image_size"]
    for tower, inputs, expected in zip(
        ("image", "text"), (images, tokens), features(bundle, images), strict=True
    ):
        session = onnxruntime.InferenceSession(out / about[tower]["file"])
        (taken,) = session.get_inputs()
        assert taken.name == about[tower]["input"]
        for count in (1, 2, 3):
            (found,) = session.run(None, {taken.name: inputs[:count].numpy()})
            torch.testing.assert_close(
                torch.from_numpy(found), expected[:count], rtol=1e-5, atol=1e-5
            )
        assert found.shape == (3, about["dim"])


@pytest.mark.slow
def test_a_large_tower_keeps_its_weights_in_a_file_beside_the_graph(
    bert: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(onnx, "MOST_BYTES", 0)
    export(build("bert locked", bert), "onnx", tmp_path / "out")
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert {"image.onnx.data", "text.onnx.data"} < names


def test_the_missing_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = importlib.util.find_spec

    def without(name: str) -> Any:
        return None if name == "onnxscript" else real(name)

    monkeypatch.setattr(importlib.util, "find_spec", without)
    with pytest.raises(ConfigError, match="format=onnx needs onnxscript; run: pip install 'twoto"):
        export(clip_bundle(VIT), "onnx", tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_another_tokenizer_is_noticed(bert: Path, tmp_path: Path) -> None:
    bundle = build("bert locked", bert)
    text = tokenizer_json(bundle.tokenizer)
    assert text.count('"dog":5') == text.count('"cat":6') == 1
    text = text.replace('"dog":5', '"dog":6').replace('"cat":6', '"cat":5')
    (tmp_path / "tokenizer.json").write_text(text)
    with pytest.raises(RuntimeError, match="tokenizer.json gives other token ids"):
        onnx.check(bundle, tmp_path, make_probe(bundle, tmp_path / "best.safetensors"))
