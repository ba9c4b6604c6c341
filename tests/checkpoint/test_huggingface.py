from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPProcessor

from tests.checkpoint.test_openai import Planted
from tests.models.tiny import ODD, RESNET, VIT, make_clip
from twotower.checkpoint.clip import Architecture, ClipCheckpoint, Pixels, infer_architecture
from twotower.checkpoint.huggingface import read_huggingface, write_huggingface
from twotower.models.dual_encoder import MODELS
from twotower.models.openai_clip import to_openai_names
from twotower.models.openai_finetune import OpenaiFinetuneConfig
from twotower.settings import ConfigError

CENTRED = {"image_mean": [0.5, 0.4, 0.3], "image_std": [0.2, 0.3, 0.4]}


def make_model(activation: str, **text: Any) -> CLIPModel:
    """A random CLIPModel with heads and hidden layers that are not OpenAI's."""
    torch.manual_seed(0)
    config = CLIPConfig(
        projection_dim=24,
        text_config={
            "hidden_size": 48,
            "intermediate_size": 100,
            "num_attention_heads": 4,
            "num_hidden_layers": 2,
            "max_position_embeddings": 11,
            "hidden_act": activation,
            **text,
        },
        vision_config={
            "hidden_size": 64,
            "intermediate_size": 90,
            "num_attention_heads": 8,
            "num_hidden_layers": 3,
            "image_size": 32,
            "patch_size": 8,
            "hidden_act": activation,
        },
    )
    model = CLIPModel(config).eval()
    with torch.no_grad():
        for tensor in model.parameters():
            tensor.add_(0.05 * torch.randn_like(tensor))
    return model


def features(model: CLIPModel, images: Tensor, tokens: Tensor, pixels: Pixels) -> Tensor:
    mean, std = (torch.tensor(c).view(3, 1, 1) for c in (pixels.mean, pixels.std))
    with torch.no_grad():
        of_images = model.get_image_features(pixel_values=(images / 255 - mean) / std)
        of_texts = model.get_text_features(input_ids=tokens)
    return torch.cat([of_images.pooler_output, of_texts.pooler_output])


def assert_equal_features(folder: Path, model: CLIPModel, pixels: Pixels) -> None:
    """What `model.weights=<folder>` gives is what the model of transformers gives."""
    bundle = MODELS.build(OpenaiFinetuneConfig(weights=str(folder)))
    size = model.config.vision_config.image_size
    images = torch.randint(0, 256, (3, 3, size, size), dtype=torch.uint8)
    tokens = bundle.tokenizer(["a dog", "", "two cats on the beach, one of them in the water!"])
    expected = features(model, images, tokens, pixels)
    with torch.no_grad():
        bundle.model.eval()
        found = torch.cat([bundle.model.encode_image(images), bundle.model.encode_text(tokens)])
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("activation", ["quick_gelu", "gelu"])
def test_a_saved_model_gives_equal_features_here(activation: str, tmp_path: Path) -> None:
    model = make_model(activation)
    model.save_pretrained(tmp_path)
    assert_equal_features(tmp_path, model, Pixels())
    other = {"gelu": "quick_gelu", "quick_gelu": "gelu"}[activation]
    config = json.loads((tmp_path / "config.json").read_text())
    for tower in ("text_config", "vision_config"):
        config[tower]["hidden_act"] = other
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(AssertionError):  # the activation is what is read, and it matters
        assert_equal_features(tmp_path, model, Pixels())


@pytest.mark.parametrize("saved_with", ["image processor", "processor"])
def test_the_preparation_of_pictures_is_read_wherever_it_stands(
    saved_with: str, tmp_path: Path
) -> None:
    from twotower.export.tokenizers import openai_tokenizer

    model = make_model("gelu")
    model.save_pretrained(tmp_path)
    prepares: Any = CLIPImageProcessor(size={"shortest_edge": 32}, resample=2, **CENTRED)
    if saved_with == "processor":
        prepares = CLIPProcessor(prepares, openai_tokenizer(11))
    prepares.save_pretrained(tmp_path)
    expected = Pixels(mean=(0.5, 0.4, 0.3), std=(0.2, 0.3, 0.4), interpolation="bilinear")
    assert read_huggingface(tmp_path).pixels == expected
    assert_equal_features(tmp_path, model, expected)


def test_shards_and_pickles_of_tensors_are_read(tmp_path: Path) -> None:
    model = make_model("quick_gelu")
    model.save_pretrained(tmp_path / "whole")
    model.save_pretrained(tmp_path / "shards", max_shard_size="200KB")
    index = tmp_path / "shards" / "model.safetensors.index.json"
    assert index.is_file()
    old = tmp_path / "old"
    old.mkdir()
    (old / "config.json").write_bytes((tmp_path / "whole" / "config.json").read_bytes())
    positions = {"text_model.embeddings.position_ids": torch.arange(11)[None]}
    torch.save({**model.state_dict(), **positions}, old / "pytorch_model.bin")
    expected = read_huggingface(tmp_path / "whole").weights
    for name in ("shards", "old"):
        found = read_huggingface(tmp_path / name).weights
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[key], expected[key]) for key in expected)
    text = index.read_text()
    index.write_text(text.replace(".safetensors", ".gone"))
    with pytest.raises(ConfigError, match=r"gone does not exist; it should be a file of a CLIPM"):
        read_huggingface(tmp_path / "shards")
    index.write_text("{}")
    with pytest.raises(ConfigError, match="has no weight_map"):
        read_huggingface(tmp_path / "shards")


@pytest.mark.parametrize("quick_gelu", [True, False], ids=["quick_gelu", "gelu"])
@pytest.mark.parametrize("architecture", [VIT, ODD], ids=["openai", "odd"])
def test_what_is_written_is_opened_with_equal_features(
    architecture: Architecture, quick_gelu: bool, tmp_path: Path
) -> None:
    ours = make_clip(architecture, quick_gelu=quick_gelu)
    written = ClipCheckpoint(
        weights=to_openai_names(ours.state_dict()),
        architecture=architecture,
        quick_gelu=quick_gelu,
        source="test",
    )
    write_huggingface(tmp_path, written)
    theirs, told = CLIPModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not told["missing_keys"] and not told["unexpected_keys"]
    images = torch.randint(0, 256, (3, 3, 32, 32), dtype=torch.uint8)
    tokens = torch.randint(1, 49000, (3, 9))
    tokens[:, -1] = 49407
    with torch.no_grad():
        expected = torch.cat([ours.encode_image(images), ours.encode_text(tokens)])
    found = features(theirs.eval(), images, tokens, Pixels())
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert theirs.logit_scale == ours.logit_scale
    again = read_huggingface(tmp_path)
    assert replace(again, weights={}, source="") == replace(written, weights={}, source="")
    assert all(torch.equal(again.weights[name], written.weights[name]) for name in written.weights)


def test_a_resnet_is_refused(tmp_path: Path) -> None:
    weights = to_openai_names(make_clip(RESNET).state_dict())
    clip = ClipCheckpoint(
        weights=weights, architecture=infer_architecture(weights), quick_gelu=True, source=""
    )
    with pytest.raises(ConfigError, match="CLIPModel has vision transformers only"):
        write_huggingface(tmp_path, clip)
    assert os.listdir(tmp_path) == []


def test_what_cannot_be_held_or_read_gets_one_sentence(tmp_path: Path) -> None:
    make_model("gelu").save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    plain = path.read_text()
    changes = {
        "describes a model of type blip, not clip": {"model_type": "blip"},
        "different activations, gelu and relu": {"text_config": {"hidden_act": "relu"}},
        "vision_config a layer_norm_eps of 1e-06": {"vision_config": {"layer_norm_eps": 1e-6}},
        "says image_size 64, but the weights beside it are for 32": {
            "vision_config": {"image_size": 64}
        },
        "ends captions with token 7, but OpenAI's": {"text_config": {"eos_token_id": 7}},
        "is not the config of a CLIPModel": {"text_config": {"num_attention_heads": "x"}},
    }
    for sentence, change in changes.items():
        config = json.loads(plain)
        for key, value in change.items():
            config[key] = {**config[key], **value} if isinstance(value, dict) else value
        path.write_text(json.dumps(config))
        with pytest.raises(ConfigError, match=sentence):
            read_huggingface(tmp_path)
    path.write_text(plain)
    preparation = tmp_path / "preprocessor_config.json"
    preparation.write_text('{"resample": 1}')
    with pytest.raises(ConfigError, match="prepares pictures with resample 1"):
        read_huggingface(tmp_path)
    preparation.write_text('{"image_mean": [1, 2]}')
    with pytest.raises(ConfigError, match="must give one number a colour"):
        read_huggingface(tmp_path)
    preparation.unlink()
    weights = tmp_path / "model.safetensors"
    tensors = load_file(weights)
    del tensors["text_model.encoder.layers.1.self_attn.k_proj.bias"]
    save_file(tensors, weights)
    with pytest.raises(ConfigError, match="the weights have no .*layers.1.self_attn.k_proj.bias"):
        read_huggingface(tmp_path)
    weights.write_bytes(weights.read_bytes()[:5000])
    with pytest.raises(ConfigError, match="read as a file of a CLIPModel's weights: it is trunc"):
        read_huggingface(tmp_path)
    weights.unlink()
    with pytest.raises(ConfigError, match="holds a config.json and no model.safetensors or"):
        read_huggingface(tmp_path)
    path.write_text("{")
    with pytest.raises(ConfigError, match="cannot be read as JSON"):
        read_huggingface(tmp_path)


def test_a_planted_command_and_code_of_a_folder_are_not_run(tmp_path: Path) -> None:
    make_model("gelu").save_pretrained(tmp_path)
    marker = tmp_path / "marker"
    (tmp_path / "modeling.py").write_text(f"open({str(marker)!r}, 'w')\n")
    config = json.loads((tmp_path / "config.json").read_text())
    config["auto_map"] = {"AutoConfig": "modeling.Config", "AutoModel": "modeling.Model"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    read_huggingface(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    torch.save({"x": Planted(marker)}, tmp_path / "pytorch_model.bin")
    with pytest.raises(ConfigError, match=r"was refused: it asks to run \w+.system"):
        read_huggingface(tmp_path)
    assert not marker.exists()
