from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from tests.models.tiny import RESNET, VIT, bert_config, clip_bundle
from twotower.checkpoint.huggingface import write_huggingface
from twotower.checkpoint.open_clip import write_open_clip
from twotower.checkpoint.openai import write_openai
from twotower.models.clip_weights import clip_of, read_clip
from twotower.models.dual_encoder import MODELS, ModelBundle
from twotower.models.openai_finetune import OpenaiFinetuneConfig
from twotower.models.openai_pretrain import OpenaiPretrainConfig
from twotower.models.preprocess import ImageInput
from twotower.models.saved import save_bundle
from twotower.settings import ConfigError


def assert_same(one: ModelBundle, two: ModelBundle) -> None:
    assert one.assets == two.assets
    first, second = one.model.state_dict(), two.model.state_dict()
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("quick_gelu", [True, False], ids=["quick_gelu", "gelu"])
def test_every_format_gives_the_same_model(quick_gelu: bool, tmp_path: Path) -> None:
    """Weights, activation and pixel constants, with nothing said but the path."""
    bundle = clip_bundle(VIT, quick_gelu=quick_gelu, mean=(0.5, 0.4, 0.3))
    save_bundle(tmp_path / "best.safetensors", bundle, {"optimizer.0.step": torch.ones(1)})
    (tmp_path / "open_clip").mkdir()
    (tmp_path / "hf").mkdir()
    write_open_clip(tmp_path / "open_clip", clip_of(bundle))
    write_huggingface(tmp_path / "hf", clip_of(bundle))
    for name in (
        "best.safetensors",
        "open_clip",
        "open_clip/open_clip_model.safetensors",
        "hf",
        "hf/model.safetensors",
    ):
        assert_same(MODELS.build(OpenaiFinetuneConfig(weights=str(tmp_path / name))), bundle)


def test_a_pretrained_resnet_is_what_a_finetune_starts_from(tmp_path: Path) -> None:
    bundle = MODELS.build(OpenaiPretrainConfig(architecture="tiny"))
    path = tmp_path / "best.safetensors"
    save_bundle(path, bundle)
    assert_same(MODELS.build(OpenaiFinetuneConfig(weights=str(path))), bundle)


def test_openais_format_does_not_tell_the_activation(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    clip = clip_of(clip_bundle(RESNET))
    path = tmp_path / "clip.pt"
    write_openai(path, clip.weights)
    found = read_clip(path)
    assert found.quick_gelu is None and found.architecture == RESNET
    with caplog.at_level("INFO"):
        bundle = MODELS.build(OpenaiFinetuneConfig(weights=str(path)))
    assert bundle.assets["activation"] == "quick_gelu"
    assert "clip.pt does not tell its activation; QuickGELU is taken" in caplog.text


def test_a_repository_with_both_formats_is_read_by_the_weights_that_it_holds(
    tmp_path: Path,
) -> None:
    ours, other = clip_of(clip_bundle(VIT)), clip_of(clip_bundle(VIT, quick_gelu=False))
    write_huggingface(tmp_path, other)
    write_open_clip(tmp_path, ours)
    assert read_clip(tmp_path).quick_gelu
    (tmp_path / "open_clip_model.safetensors").unlink()
    assert not read_clip(tmp_path).quick_gelu


def test_wrong_paths_get_a_sentence(bert: Path, tmp_path: Path) -> None:
    save_bundle(tmp_path / "bert.safetensors", MODELS.build(bert_config(bert)))
    write_huggingface(tmp_path, clip_of(clip_bundle(VIT)))
    (tmp_path / "config.json").unlink()
    (tmp_path / "cut.safetensors").write_bytes((tmp_path / "bert.safetensors").read_bytes()[:999])
    sentences = {
        "bert.safetensors": "is a checkpoint of bert_resnet, which is none of OpenAI's",
        "model.safetensors": "holds a CLIPModel of Hugging Face's without its config.json; give",
        "cut.safetensors": "cannot be read as a file of CLIP weights: it is truncated, or",
        "": "holds neither open_clip_config.json nor config.json; give a .pt file in OpenAI's",
        "missing": "there is no .*missing; give a .pt file in OpenAI's format, a folder of",
    }
    for name, sentence in sentences.items():
        with pytest.raises(ConfigError, match=sentence):
            MODELS.build(OpenaiFinetuneConfig(weights=str(tmp_path / name)))
    with pytest.raises(ConfigError, match="describes a model of type bert, not clip"):
        MODELS.build(OpenaiFinetuneConfig(weights=str(bert)))


def test_what_a_bundle_says_of_itself(bert: Path) -> None:
    with pytest.raises(ConfigError, match="checkpoint of bert_resnet is none of OpenAI's arch"):
        clip_of(MODELS.build(bert_config(bert)))
    bundle = clip_bundle(VIT, quick_gelu=False, std=(0.5, 0.5, 0.5))
    clip = clip_of(bundle)
    assert (clip.quick_gelu, clip.architecture) == (False, VIT)
    assert clip.pixels.std == ImageInput.from_json(bundle.assets["image_input"]).std
    assert json.loads(bundle.assets["architecture"])["vision_head_width"] == 64
