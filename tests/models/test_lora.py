"""Adapters begin at nothing, are all that is trained, and can be saved, loaded and merged."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from tests.models.tiny import RESNET, VIT, bert_config, make_clip
from twotower.checkpoint.openai import write_openai
from twotower.model_config import ModelConfig
from twotower.models.clip_weights import clip_of, read_clip
from twotower.models.dual_encoder import MODELS, DualEncoder, ModelBundle, PixelNorm, Tower
from twotower.models.lora import add_adapters, merge_adapters
from twotower.models.openai_clip import to_openai_names
from twotower.models.openai_finetune import OpenaiFinetuneConfig
from twotower.models.saved import load_bundle, save_bundle
from twotower.models.stages import encoder_stages
from twotower.settings import ConfigError

VARIANTS = ["bert_resnet", "bert_vit", "bert_efficientnet", "finetune_vit", "finetune_resnet"]
Make = Callable[..., ModelBundle]


@pytest.fixture
def make(bert: Path, tmp_path: Path) -> Make:
    """Builds the same weights with and without adapters."""

    def build(variant: str, **fields: object) -> ModelBundle:
        config: ModelConfig
        if variant.startswith("bert"):
            encoder = variant.replace("bert", "test")
            config = bert_config(bert, image_encoder=encoder, image_size=64, **fields)
        else:
            path = tmp_path / f"{variant}.pt"
            if not path.exists():
                clip = make_clip(VIT if variant == "finetune_vit" else RESNET)
                write_openai(path, to_openai_names(clip.state_dict()))
            config = OpenaiFinetuneConfig(weights=str(path), **fields)  # type: ignore[arg-type]
        torch.manual_seed(1)
        bundle = MODELS.build(config)
        for module in bundle.model.modules():
            if isinstance(module, nn.BatchNorm2d):
                nn.init.ones_(module.weight)  # timm's last ones in a block begin at 0
        return bundle

    return build


def inputs(bundle: ModelBundle) -> tuple[Tensor, Tensor]:
    size = bundle.eval_transform.size  # type: ignore[attr-defined]
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (4, 3, size, size), dtype=torch.uint8, generator=generator)
    return images, bundle.tokenizer(["a dog", "the beach!", "a cat", "dogs on the beach"])


def features(bundle: ModelBundle) -> Tensor:
    images, tokens = inputs(bundle)
    bundle.model.eval()
    with torch.no_grad():
        return torch.cat([bundle.model.encode_image(images), bundle.model.encode_text(tokens)])


def trained(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def train(bundle: ModelBundle, steps: int = 3) -> None:
    model = bundle.model.train()
    images, tokens = inputs(bundle)
    optimizer = torch.optim.SGD(trained(model).values(), lr=0.5)
    for _ in range(steps):
        optimizer.zero_grad()
        output = model(images, tokens)
        logits = output.logit_scale * output.image_features @ output.text_features.T
        (-logits.log_softmax(-1).diagonal().mean()).backward()
        optimizer.step()


@pytest.mark.parametrize("variant", VARIANTS)
def test_features_begin_as_those_of_the_weights(variant: str, make: Make) -> None:
    plain, adapted = make(variant), make(variant, lora_rank=3, lora_dropout=0.5)
    assert torch.equal(features(adapted), features(plain))


@pytest.mark.parametrize("variant", VARIANTS)
def test_adapters_and_heads_are_trained_and_nothing_else_moves(variant: str, make: Make) -> None:
    bundle = make(variant, lora_rank=3)
    names = set(trained(bundle.model))
    adapters = {name for name in names if ".lora_A." in name or ".lora_B." in name}
    assert all(name.startswith(("image_tower.trunk.", "text_tower.trunk.")) for name in adapters)
    heads = {n for n, _ in bundle.model.named_parameters() if n.split(".")[1:2] == ["head"]}
    assert names - adapters == heads | {"logit_scale"}
    before = {name: tensor.clone() for name, tensor in bundle.model.state_dict().items()}
    train(bundle)
    for name, tensor in bundle.model.state_dict().items():
        assert torch.equal(tensor, before[name]) == (name not in names), name


@pytest.mark.parametrize(
    ("variant", "ends"),
    [
        ("finetune_vit", {"mlp.c_fc", "mlp.c_proj"}),
        ("finetune_resnet", {"0.conv1", "0.conv3", "1.conv1", "1.conv3", "downsample.0"}),
    ],
)
def test_weights_that_fused_attention_reads_are_left_alone(
    variant: str, ends: set[str], make: Make
) -> None:
    adapters = [name for name in trained(make(variant, lora_rank=2).model) if ".lora_A." in name]
    found: dict[str, set[str]] = {"image": set(), "text": set()}
    for name in adapters:
        layer = name.split(".lora_A.")[0].split(".")
        found[layer[0].removesuffix("_tower")].add(".".join(layer[-2:]))
    assert found == {"image": ends, "text": {"mlp.c_fc", "mlp.c_proj"}}


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_trained_bundle_is_loaded_from_its_file_alone(
    variant: str, make: Make, tmp_path: Path
) -> None:
    bundle = make(variant, lora_rank=3, lora_alpha=5, lora_dropout=0.1)
    train(bundle)
    path = tmp_path / "best.safetensors"
    save_bundle(path, bundle)
    loaded = load_bundle(path)
    assert torch.equal(features(loaded), features(bundle))
    assert list(trained(loaded.model)) == list(trained(bundle.model))
    assert loaded.config == bundle.config


@pytest.mark.parametrize("variant", VARIANTS)
def test_merged_weights_give_the_adapted_features(variant: str, make: Make, tmp_path: Path) -> None:
    plain, bundle = make(variant), make(variant, lora_rank=3, lora_alpha=5)
    train(bundle)
    adapted = features(bundle)
    merged = merge_adapters(bundle)
    torch.testing.assert_close(features(merged), adapted, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(adapted, features(plain), rtol=1e-2)
    assert torch.equal(features(bundle), adapted)
    assert list(merged.model.state_dict()) == list(plain.model.state_dict())
    save_bundle(tmp_path / "merged.safetensors", merged)
    assert torch.equal(features(load_bundle(tmp_path / "merged.safetensors")), features(merged))
    assert merge_adapters(plain) is plain


def test_other_formats_and_finetunes_take_the_merged_weights(make: Make, tmp_path: Path) -> None:
    bundle = make("finetune_vit", lora_rank=3)
    train(bundle)
    path = tmp_path / "best.safetensors"
    save_bundle(path, bundle)
    expected = to_openai_names(merge_adapters(bundle).model.state_dict())
    for clip in (clip_of(bundle), read_clip(path)):
        assert clip.weights.keys() == expected.keys()
        assert all(torch.equal(clip.weights[name], expected[name]) for name in expected)


def test_only_unlocked_stages_are_adapted(make: Make) -> None:
    bundle = make("bert_vit", lora_rank=2, image_unlocked_stages=0, text_unlocked_stages=2)
    model = bundle.model
    assert model.image_tower.locked and not model.text_tower.locked
    assert not any("lora" in name for name, _ in model.image_tower.named_parameters())
    layers = {n.split(".layer.")[1][0] for n in trained(model) if "lora" in n}
    assert layers == {"1", "2"}
    embeddings, *stages = encoder_stages(model.text_tower.trunk, "none")  # type: ignore[arg-type]
    assert not any(p.requires_grad for p in embeddings + stages[0])
    assert all(sum(p.requires_grad for p in stage) == 12 for stage in stages[1:])


def test_targets_choose_layers_by_the_ends_of_their_names(make: Make) -> None:
    targets = ["attn.qkv", "query", "value"]
    model = make("bert_vit", lora_rank=2, lora_targets=targets).model
    names = {n.split(".lora_")[0].split(".", 6)[-1] for n in trained(model) if "lora" in n}
    assert {name.rsplit(".", 1)[-1] for name in names} == {"qkv", "query", "value"}


def test_dropout_of_adapters_works_in_training_alone(make: Make) -> None:
    bundle = make("bert_vit", lora_rank=2, lora_dropout=0.5)
    train(bundle, 1)
    drops = [m for n, m in bundle.model.named_modules() if n.endswith("lora_dropout.default")]
    assert drops and all(isinstance(m, nn.Dropout) and m.p == 0.5 and m.training for m in drops)
    bundle.model.eval()
    assert not any(module.training for module in drops)


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        (
            {"lora_targets": ["query"]},
            "model.lora_targets has no layer of the image encoder, which has fc1, fc2, proj, qkv; "
            "add one, or use model.image_unlocked_stages=0",
        ),
        (
            {"lora_targets": ["qkv", "query", "out_proj"]},
            "model.lora_targets: no layer that can be adapted is named out_proj; there are dense, "
            "fc1, fc2, key, proj, qkv, query, value",
        ),
        (
            {"image_unlocked_stages": 0, "text_unlocked_stages": 0},
            "model.lora_rank=2 adapts unlocked stages, but both encoders are locked; use "
            "model.image_unlocked_stages=-1 or model.text_unlocked_stages=-1",
        ),
    ],
)
def test_what_cannot_be_adapted_gets_a_sentence(
    fields: dict[str, object], sentence: str, make: Make
) -> None:
    with pytest.raises(ConfigError) as raised:
        make("bert_vit", lora_rank=2, **fields)
    assert str(raised.value) == sentence


def test_an_encoder_without_layers_gets_a_sentence(make: Make) -> None:
    bundle = make("bert_vit", lora_rank=2, image_unlocked_stages=0)
    trunk = nn.Sequential(PixelNorm((0.5,) * 3, (0.5,) * 3), nn.Conv2d(3, 4, 3), nn.Flatten())
    image_tower = Tower(trunk, nn.Identity())
    model = DualEncoder(image_tower, bundle.model.text_tower)
    with pytest.raises(ConfigError) as raised:
        add_adapters(model, bundle.config, *inputs(bundle))  # type: ignore[arg-type]
    assert str(raised.value) == (
        "model.lora_rank: the image encoder has no linear layer or 1x1 convolution in its unlocked "
        "stages; use 0, or model.image_unlocked_stages=0"
    )


def test_without_peft_there_is_a_sentence(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ConfigError) as raised:
        make("bert_vit", lora_rank=2)
    assert str(raised.value) == (
        "model.lora_rank needs the package peft; run: pip install twotower[lora]"
    )
