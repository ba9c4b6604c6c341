from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.models import reference_clip as reference
from tests.models.test_openai_clip import normalised
from tests.models.tiny import RESNET, VIT, bert_config, make_clip
from twotower.checkpoint.openai import Architecture, read_openai, write_openai
from twotower.models import openai_export
from twotower.models.dual_encoder import MODELS, ModelBundle
from twotower.models.openai_clip import Activation, to_openai_names
from twotower.models.openai_export import export_openai
from twotower.models.openai_finetune import OpenaiFinetuneConfig
from twotower.models.openai_pretrain import OpenaiPretrainConfig
from twotower.settings import ConfigError


def bundle_of(architecture: Architecture, folder: Path, **fields: Any) -> ModelBundle:
    path = folder / "source.pt"
    write_openai(path, to_openai_names(make_clip(architecture).state_dict()))
    bundle = MODELS.build(OpenaiFinetuneConfig(weights=str(path), **fields))
    bundle.model.eval()
    return bundle


@pytest.mark.parametrize("architecture", [VIT, RESNET], ids=["vit", "resnet"])
def test_the_file_gives_equal_features_here_and_in_the_reference(
    architecture: Architecture, tmp_path: Path
) -> None:
    bundle = bundle_of(architecture, tmp_path)
    path = tmp_path / "out" / "clip.pt"
    export_openai(bundle, path)
    size = architecture.image_size
    images = torch.randint(0, 256, (2, 3, size, size), dtype=torch.uint8)
    tokens = bundle.tokenizer(["a dog", "the beach"])
    again = MODELS.build(OpenaiFinetuneConfig(weights=str(path))).model.eval()
    with torch.no_grad():
        assert torch.equal(again.encode_image(images), bundle.model.encode_image(images))
        assert torch.equal(again.encode_text(tokens), bundle.model.encode_text(tokens))
    weights = read_openai(path)
    encode = (
        reference.encode_image_vit if architecture.patch_size else reference.encode_image_resnet
    )
    with torch.no_grad():
        found = bundle.model.encode_image(images)
    torch.testing.assert_close(encode(weights, normalised(images)), found, rtol=1e-4, atol=1e-4)


def test_a_bundle_with_locked_stages_is_exported(tmp_path: Path) -> None:
    bundle = bundle_of(VIT, tmp_path, image_unlocked_stages=1, text_unlocked_stages=0)
    export_openai(bundle, tmp_path / "clip.pt")
    flags = [parameter.requires_grad for parameter in bundle.model.parameters()]
    assert sum(flags) == 4  # the projection with its norm, and logit_scale


@pytest.mark.parametrize("architecture", [VIT, RESNET], ids=["vit", "resnet"])
def test_another_programs_loader_opens_it(architecture: Architecture, tmp_path: Path) -> None:
    """open_clip's loader follows `clip.load`: it tries TorchScript, and infers the architecture."""
    from open_clip import load_openai_model

    bundle = bundle_of(architecture, tmp_path)
    path = tmp_path / "clip.pt"
    export_openai(bundle, path)
    theirs = load_openai_model(str(path), precision="fp32", device="cpu").eval()
    size = architecture.image_size
    images = torch.randint(0, 256, (2, 3, size, size), dtype=torch.uint8)
    tokens = bundle.tokenizer(["a dog", "the beach"])
    with torch.no_grad():
        pairs = [
            (theirs.encode_image(normalised(images)), bundle.model.encode_image(images)),
            (theirs.encode_text(tokens), bundle.model.encode_text(tokens)),
        ]
    for found, expected in pairs:  # their weights have passed through half precision
        assert torch.cosine_similarity(found, expected).min() > 0.9999


def test_a_pretrained_tiny_becomes_what_finetuning_starts_from(tmp_path: Path) -> None:
    bundle = MODELS.build(OpenaiPretrainConfig(architecture="tiny"))
    path = tmp_path / "tiny.pt"
    export_openai(bundle, path)
    again = MODELS.build(OpenaiFinetuneConfig(weights=str(path)))
    assert again.assets == bundle.assets
    for one, two in zip(
        again.model.state_dict().values(), bundle.model.state_dict().values(), strict=True
    ):
        assert torch.equal(one, two)


def test_what_the_format_cannot_say_is_refused(bert: Path, tmp_path: Path) -> None:
    path = tmp_path / "out.pt"
    with pytest.raises(
        ConfigError, match="a checkpoint of bert_resnet cannot be written in OpenAI"
    ):
        export_openai(MODELS.build(bert_config(bert)), path)
    with pytest.raises(
        ConfigError, match="use GELU, but readers of OpenAI's format take QuickGELU"
    ):
        export_openai(bundle_of(VIT, tmp_path, activation=Activation.gelu), path)
    bundle = bundle_of(VIT, tmp_path)
    bundle.assets["image_input"] = bundle.assets["image_input"].replace("0.48145466", "0.5")
    with pytest.raises(ConfigError, match="have their own pixel mean and std"):
        export_openai(bundle, path)
    assert not path.exists()


def test_a_file_that_came_out_different_is_noticed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def wrong(path: Path, weights: dict[str, torch.Tensor]) -> None:
        write_openai(path, {**weights, "text_projection": weights["text_projection"] * 1.01})

    monkeypatch.setattr(openai_export, "write_openai", wrong)
    with pytest.raises(RuntimeError, match="the features of .* differ"):
        export_openai(bundle_of(VIT, tmp_path), tmp_path / "out.pt")
