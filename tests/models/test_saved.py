from __future__ import annotations

import json
import shutil
from dataclasses import fields
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from tests.models.tiny import RESNET, VIT, bert_config, make_clip
from twotower.checkpoint.openai import write_openai
from twotower.model_config import ModelConfig
from twotower.models.bert_resnet import HeadKind
from twotower.models.dual_encoder import MODELS, ModelBundle
from twotower.models.huggingface_text import Pooling
from twotower.models.openai_clip import to_openai_names
from twotower.models.openai_finetune import OpenaiFinetuneConfig
from twotower.models.openai_pretrain import OpenaiPretrainConfig
from twotower.models.saved import load_bundle, load_weights, save_bundle
from twotower.settings import ConfigError

VARIANTS = ["bert_resnet", "bert_vit", "finetune_vit", "finetune_resnet", "pretrain"]


def make(variant: str, bert: Path, sources: Path) -> ModelConfig:
    """A config whose sources all lie under `sources`."""
    if variant.startswith("bert"):
        folder = shutil.copytree(bert, sources / "bert")
        if variant == "bert_resnet":
            return bert_config(folder, pooling=Pooling.cls, image_unlocked_stages=0)
        return bert_config(
            folder,
            image_encoder="test_vit",
            image_size=64,
            head=HeadKind.mlp,
            text_unlocked_stages=2,
        )
    if variant.startswith("finetune"):
        clip = make_clip(VIT if variant.endswith("vit") else RESNET)
        write_openai(sources / "clip.pt", to_openai_names(clip.state_dict()))
        return OpenaiFinetuneConfig(weights=str(sources / "clip.pt"), text_unlocked_stages=0)
    return OpenaiPretrainConfig(architecture="tiny", context_length=9)


def test_every_registered_variant_is_among_the_cases(bert: Path, tmp_path: Path) -> None:
    made = set()
    for variant in VARIANTS:
        (tmp_path / variant).mkdir()
        made.add(make(variant, bert, tmp_path / variant).registered_name)
    assert made == set(MODELS)


def outputs(bundle: ModelBundle) -> list[torch.Tensor]:
    size = bundle.eval_transform.size  # type: ignore[attr-defined]
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (3, 3, size, size), dtype=torch.uint8, generator=generator)
    tokens = bundle.tokenizer(["a dog", "the beach!", ""])
    bundle.model.eval()
    with torch.no_grad():
        return [tokens, *bundle.model(images, tokens)]


@pytest.mark.parametrize("variant", VARIANTS)
def test_features_are_bit_equal_after_the_sources_are_gone(
    variant: str, bert: Path, tmp_path: Path
) -> None:
    sources, path = tmp_path / "sources", tmp_path / "run" / "best.safetensors"
    sources.mkdir()
    torch.manual_seed(3)
    bundle = MODELS.build(make(variant, bert, sources))
    bundle.model.train()(
        torch.zeros(2, 3, *[bundle.eval_transform.size] * 2, dtype=torch.uint8),  # type: ignore[attr-defined]
        bundle.tokenizer(["a", "b"]),
    )
    before = outputs(bundle)
    save_bundle(path, bundle, step=7)
    shutil.rmtree(sources)
    loaded = load_bundle(path)
    assert str(sources) not in json.dumps(bundle.assets)
    for one, two in zip(before, outputs(loaded), strict=True):
        assert torch.equal(one, two)
    assert loaded.config == bundle.config and loaded.assets == bundle.assets
    assert loaded.eval_transform == bundle.eval_transform
    assert loaded.train_transform == bundle.train_transform
    trained = [
        [name for name, p in b.model.named_parameters() if p.requires_grad]
        for b in (bundle, loaded)
    ]
    assert trained[0] == trained[1]
    assert not loaded.model.training


def test_the_header_tells_what_it_is_and_training_tensors_stay_apart(
    bert: Path, tmp_path: Path
) -> None:
    bundle = MODELS.build(bert_config(bert))
    path = tmp_path / "last.safetensors"
    moments = {"exp_avg.0": torch.arange(3.0)}
    save_bundle(path, bundle, moments, run="x", step=7, metrics={"r": 0.5})
    header, tensors = load_weights(path, MODELS.build(bert_config(bert)))
    assert header["variant"] == "bert_resnet" and header["run"] == "x" and header["step"] == 7
    assert header["model"].keys() == {field.name for field in fields(bundle.config)}
    assert tensors.keys() == moments.keys()
    assert torch.equal(tensors["exp_avg.0"], moments["exp_avg.0"])
    with safe_open(path, framework="pt") as file:
        assert json.loads(file.metadata()["twotower"])["metrics"] == {"r": 0.5}


def test_weights_are_put_into_a_bundle_that_is_built(bert: Path, tmp_path: Path) -> None:
    path = tmp_path / "last.safetensors"
    torch.manual_seed(0)
    bundle = MODELS.build(bert_config(bert))
    save_bundle(path, bundle)
    torch.manual_seed(1)
    other = MODELS.build(bert_config(bert))
    assert not torch.equal(outputs(other)[1], outputs(bundle)[1])
    load_weights(path, other)
    assert torch.equal(outputs(other)[1], outputs(bundle)[1])


def test_checkpoints_that_do_not_fit_get_a_sentence(bert: Path, tmp_path: Path) -> None:
    path = tmp_path / "best.safetensors"
    bundle = MODELS.build(bert_config(bert))
    save_bundle(path, bundle)
    pretrain = MODELS.build(OpenaiPretrainConfig(architecture="tiny"))
    with pytest.raises(ConfigError) as raised:
        load_weights(path, pretrain)
    assert str(raised.value) == (
        f"{path} is a checkpoint of bert_resnet, not of openai_pretrain; "
        "use model=bert_resnet, or another checkpoint"
    )
    with pytest.raises(ConfigError, match="the weights of .* do not fit its config: size mismatch"):
        load_weights(path, MODELS.build(bert_config(bert, embed_dim=8)))
    with safe_open(path, framework="pt") as file:
        header = json.loads(file.metadata()["twotower"])
    for change, sentence in [
        ({"format": 2}, "holds variant 'bert_resnet' in format 2, which this version"),
        ({"variant": "siglip"}, "holds variant 'siglip' in format 1, which this version"),
        ({"model": {**header["model"], "new": 1}}, "model.new is not known to this version"),
        ({"model": {**header["model"], "pooling": "max"}}, "model.pooling=max is not known to"),
    ]:
        save_file({"a": torch.ones(1)}, path, {"twotower": json.dumps(header | change)})
        with pytest.raises(ConfigError, match=sentence):
            load_bundle(path)
        if "format" in change:
            with pytest.raises(ConfigError, match=sentence):
                load_weights(path, bundle)
    with pytest.raises(ConfigError, match="no such checkpoint"):
        load_bundle(tmp_path / "none.safetensors")
    with pytest.raises(ConfigError, match="is a folder"):
        load_bundle(tmp_path)
