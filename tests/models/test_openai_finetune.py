from __future__ import annotations

import urllib.error
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from open_clip.transformer import QuickGELU
from safetensors.torch import save_file

from tests.models.tiny import RESNET, VIT, make_clip
from twotower.checkpoint.clip import Architecture
from twotower.checkpoint.openai import write_openai
from twotower.models.dual_encoder import MODELS, DualEncoder, ModelBundle
from twotower.models.openai_clip import ARCHITECTURES, Activation, to_openai_names
from twotower.models.openai_finetune import (
    OpenaiFinetuneConfig,
    cached_openai_weights,
    openai_archive,
)
from twotower.settings import ConfigError

TOKENS = torch.randint(1, 49000, (3, 9))
IMAGES = torch.randint(0, 256, (3, 3, 32, 32), dtype=torch.uint8)


@pytest.fixture(scope="module")
def clip() -> DualEncoder:
    return make_clip(VIT)


@pytest.fixture(scope="module")
def weights(clip: DualEncoder, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("openai") / "clip.pt"
    write_openai(path, to_openai_names(clip.state_dict()))
    return path


def features(model: DualEncoder) -> torch.Tensor:
    with torch.no_grad():
        model.eval()
        return torch.cat([model.encode_image(IMAGES), model.encode_text(TOKENS)])


def count_quick_gelu(bundle: ModelBundle) -> int:
    return sum(isinstance(module, QuickGELU) for module in bundle.model.modules())


def test_a_file_is_loaded_with_its_architecture_inferred(clip: DualEncoder, weights: Path) -> None:
    bundle = MODELS.build(OpenaiFinetuneConfig(weights=str(weights)))
    assert torch.equal(features(bundle.model), features(clip))
    assert bundle.tokenizer.context_length == 9
    assert count_quick_gelu(bundle) == 4
    assert all(p.dtype == torch.float32 and p.requires_grad for p in bundle.model.parameters())


def test_a_half_precision_archive_is_loaded_in_fp32(clip: DualEncoder, tmp_path: Path) -> None:
    path = tmp_path / "archive.pt"

    class Archive(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            for name, tensor in to_openai_names(clip.state_dict()).items():
                module: torch.nn.Module = self
                *parents, last = name.split(".")
                for parent in parents:
                    if not hasattr(module, parent):
                        module.add_module(parent, torch.nn.Module())
                    module = getattr(module, parent)
                module.register_parameter(last, torch.nn.Parameter(tensor.half(), False))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.save(torch.jit.script(Archive()), path)
    bundle = MODELS.build(OpenaiFinetuneConfig(weights=str(path)))
    for (name, found), expected in zip(
        bundle.model.state_dict().items(), clip.state_dict().values(), strict=True
    ):
        assert torch.equal(found, expected.half().float()), name


@pytest.mark.parametrize(
    ("activation", "count"),
    [(Activation.auto, 4), (Activation.quick_gelu, 4), (Activation.gelu, 0)],
)
def test_the_activation_can_be_chosen(weights: Path, activation: Activation, count: int) -> None:
    bundle = MODELS.build(OpenaiFinetuneConfig(weights=str(weights), activation=activation))
    assert count_quick_gelu(bundle) == count
    assert bundle.assets["activation"] == ("quick_gelu" if count else "gelu")


@pytest.mark.parametrize(
    ("architecture", "tag", "count", "mean"),
    [
        ("ViT-B/32", "laion400m_e32", 4, 0.48145466),
        ("ViT-B/32", "laion2b_s34b_b79k", 0, 0.48145466),
        ("ViT-L/14", "laion2b_s32b_b82k", 0, 0.5),
    ],
)
def test_a_tag_brings_its_own_activation_and_constants(
    weights: Path,
    monkeypatch: pytest.MonkeyPatch,
    architecture: str,
    tag: str,
    count: int,
    mean: float,
) -> None:
    monkeypatch.setattr("open_clip.pretrained.download_pretrained", lambda settings: str(weights))
    monkeypatch.setitem(ARCHITECTURES, architecture, VIT)
    bundle = MODELS.build(OpenaiFinetuneConfig(architecture=architecture, weights=tag))
    assert count_quick_gelu(bundle) == count
    norm = bundle.model.image_tower.trunk[0]
    assert norm.mean[0] == pytest.approx(mean)


def test_locked_towers_are_not_trained(weights: Path) -> None:
    bundle = MODELS.build(OpenaiFinetuneConfig(weights=str(weights), image_unlocked_stages=0))
    trained = {name for name, p in bundle.model.named_parameters() if p.requires_grad}
    everything = {name for name, _ in bundle.model.named_parameters()}
    assert trained == {name for name in everything if not name.startswith("image_tower.")}
    assert bundle.model.image_tower.locked and not bundle.model.text_tower.locked
    with pytest.raises(ConfigError, match="leave nothing to train"):
        OpenaiFinetuneConfig(image_unlocked_stages=0, text_unlocked_stages=0)


@pytest.mark.parametrize("architecture", [VIT, RESNET])
def test_the_last_stages_are_trained_and_the_rest_stays_bit_for_bit(
    architecture: Architecture, tmp_path: Path
) -> None:
    clip, path = make_clip(architecture), tmp_path / "clip.pt"
    write_openai(path, to_openai_names(clip.state_dict()))
    config = OpenaiFinetuneConfig(
        weights=str(path), image_unlocked_stages=2, text_unlocked_stages=1
    )
    model = MODELS.build(config).model.train()
    vision = {
        VIT: ("transformer.resblocks.1.", "ln_post.", "proj"),
        RESNET: ("layer4.", "attnpool."),
    }[architecture]
    unlocked = (
        "logit_scale",
        *(f"image_tower.trunk.1.{name}" for name in vision),
        "text_tower.trunk.ln_final.",
        "text_tower.trunk.text_projection",
    )
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained == {name for name in dict(model.named_parameters()) if name.startswith(unlocked)}
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0)
    size = architecture.image_size
    output = model(
        torch.randint(0, 256, (4, 3, size, size), dtype=torch.uint8), TOKENS[[0, 1, 2, 0]]
    )
    logits = output.logit_scale * output.image_features @ output.text_features.T
    (-logits.log_softmax(-1).diagonal().mean()).backward()
    optimizer.step()
    before, after = clip.state_dict(), model.state_dict()
    for name, tensor in after.items():
        if not name.startswith(unlocked):
            assert torch.equal(tensor, before[name]), name
        elif name in trained and not name.endswith(("k_proj.bias", "logit_scale")):
            assert not torch.equal(tensor, before[name]), name
    with pytest.raises(
        ConfigError, match="text_unlocked_stages is 9, but this encoder has [34] st"
    ):
        MODELS.build(OpenaiFinetuneConfig(weights=str(path), text_unlocked_stages=9))


def test_openais_archive_is_looked_for_in_the_cache_and_its_checksum_is_known(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ARCHITECTURES:
        if name != "tiny":
            url, sha256 = openai_archive(name)
            assert url.endswith(".pt") and len(sha256) == 64
    config = OpenaiFinetuneConfig(architecture="RN50", cache_dir=str(tmp_path))
    assert cached_openai_weights(config) is None

    def refuse(*_: Any, **__: Any) -> None:
        raise urllib.error.URLError("no network")

    monkeypatch.setattr("urllib.request.urlopen", refuse)
    with pytest.raises(
        ConfigError, match=r"^cannot download .*RN50.pt \(no network\); put the file"
    ):
        MODELS.build(config)


def test_weights_that_do_not_fit_get_a_sentence(
    clip: DualEncoder, weights: Path, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError) as raised:
        MODELS.build(OpenaiFinetuneConfig(architecture="ViT-B/32", weights=str(weights)))
    assert str(raised.value).startswith(
        f"model.architecture is ViT-B/32, but {weights} holds another one (embed_dim 24, "
    )
    incomplete = to_openai_names(clip.state_dict())
    del incomplete["transformer.resblocks.1.ln_2.bias"]
    write_openai(tmp_path / "incomplete.pt", incomplete)
    fewer = to_openai_names(clip.state_dict())
    fewer["token_embedding.weight"] = fewer["token_embedding.weight"][:1000]
    write_openai(tmp_path / "fewer.pt", fewer)
    save_file({"a": torch.ones(1)}, tmp_path / "other.safetensors")
    sentences = {
        "incomplete.pt": "the weights of .* do not fit: .*ln_2.bias is missing",
        "fewer.pt": "knows 1000 tokens, but OpenAI's tokenizer, .*, has 49408",
        "other.safetensors": "does not hold a CLIP in OpenAI's format",
        "none.safetensors": "there is no .*; give a .pt file in OpenAI's format, a folder of",
        "none.pt": "there is no ",
    }
    for name, sentence in sentences.items():
        with pytest.raises(ConfigError, match=sentence):
            MODELS.build(OpenaiFinetuneConfig(weights=str(tmp_path / name)))
    with pytest.raises(
        ConfigError, match="neither a file nor a tag of ViT-B/32; the tags are open"
    ):
        MODELS.build(OpenaiFinetuneConfig(weights="laion9b"))
    with pytest.raises(ConfigError, match="model.architecture has no 'tiny'"):
        OpenaiFinetuneConfig(architecture="tiny")


def test_open_clips_own_safetensors_are_read(clip: DualEncoder, tmp_path: Path) -> None:
    path = tmp_path / "open_clip_model.safetensors"
    tensors = {k: v.clone() for k, v in to_openai_names(clip.state_dict()).items()}
    save_file(tensors, path)
    bundle = MODELS.build(OpenaiFinetuneConfig(weights=str(path)))
    assert torch.equal(features(bundle.model), features(clip))
    path.write_bytes(path.read_bytes()[:-5])
    with pytest.raises(ConfigError, match="truncated"):
        MODELS.build(OpenaiFinetuneConfig(weights=str(path)))


def test_an_explicit_architecture_that_fits_is_taken(
    weights: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(ARCHITECTURES, "ViT-B/32", replace(VIT))
    config = OpenaiFinetuneConfig(architecture="ViT-B/32", weights=str(weights))
    assert MODELS.build(config).tokenizer.context_length == 9
