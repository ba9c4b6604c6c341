from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.export.parts import TEXTS, export, features, random_images
from tests.models import reference_clip as reference
from tests.models.test_openai_clip import normalised
from tests.models.tiny import ODD, RESNET, VIT, bert_config, clip_bundle
from twotower.checkpoint.clip import Architecture
from twotower.checkpoint.openai import read_openai
from twotower.models.dual_encoder import MODELS
from twotower.models.openai_clip import to_openai_names
from twotower.models.openai_finetune import OpenaiFinetuneConfig
from twotower.settings import ConfigError


@pytest.mark.parametrize("architecture", [VIT, RESNET], ids=["vit", "resnet"])
def test_the_file_gives_equal_features_here_and_in_the_reference(
    architecture: Architecture, tmp_path: Path
) -> None:
    bundle = clip_bundle(architecture)
    path = tmp_path / "out" / "clip.pt"
    assert f"clip.load('{path}')" in export(bundle, "openai", path)
    images = random_images(bundle)
    again = MODELS.build(OpenaiFinetuneConfig(weights=str(path)))
    for found, expected in zip(features(again, images), features(bundle, images), strict=True):
        assert torch.equal(found, expected)
    weights = read_openai(path)
    encode = (
        reference.encode_image_vit if architecture.patch_size else reference.encode_image_resnet
    )
    with torch.no_grad():
        found = bundle.model.encode_image(images)
    torch.testing.assert_close(encode(weights, normalised(images)), found, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("architecture", [VIT, RESNET], ids=["vit", "resnet"])
def test_another_programs_loader_opens_it(architecture: Architecture, tmp_path: Path) -> None:
    """open_clip's loader follows `clip.load`: it tries TorchScript, and infers the architecture."""
    from open_clip import load_openai_model

    bundle = clip_bundle(architecture)
    path = tmp_path / "clip.pt"
    export(bundle, "openai", path)
    theirs = load_openai_model(str(path), precision="fp32", device="cpu").eval()
    images = random_images(bundle)
    with torch.no_grad():
        pairs = zip(
            (theirs.encode_image(normalised(images)), theirs.encode_text(bundle.tokenizer(TEXTS))),
            features(bundle, images),
            strict=True,
        )
    for found, expected in pairs:  # their weights have passed through half precision
        assert torch.cosine_similarity(found, expected).min() > 0.9999


def test_locked_towers_are_exported_as_others_are(tmp_path: Path) -> None:
    """torch takes other kernels for them, so their features differ in the last digits."""
    bundle = clip_bundle(VIT)
    bundle.model.requires_grad_(False)
    export(bundle, "openai", tmp_path / "clip.pt")
    weights = read_openai(tmp_path / "clip.pt")
    expected = to_openai_names(bundle.model.state_dict())
    assert all(torch.equal(weights[name], tensor) for name, tensor in expected.items())


def test_what_the_format_cannot_say_is_refused(bert: Path, tmp_path: Path) -> None:
    bundles = {
        "of bert_resnet is none of OpenAI's": MODELS.build(bert_config(bert)),
        "use GELU, but readers of OpenAI's format take QuickGELU": clip_bundle(
            VIT, quick_gelu=False
        ),
        "have pixel constants or a resizing of their own": clip_bundle(VIT, mean=(0.5, 0.5, 0.5)),
        "have heads or hidden layers of their own width": clip_bundle(ODD),
    }
    for sentence, bundle in bundles.items():
        with pytest.raises(ConfigError, match=sentence):
            export(bundle, "openai", tmp_path / "out.pt")
    assert list(tmp_path.iterdir()) == []
