from __future__ import annotations

import time

import pytest
import torch
import torch.nn.functional as F

from tests.models import reference_clip as reference
from tests.models.tiny import RESNET, VIT, make_clip
from twotower.checkpoint.clip import Architecture, infer_architecture
from twotower.models.openai_clip import (
    ARCHITECTURES,
    build_towers,
    from_openai_names,
    to_openai_names,
)
from twotower.models.openai_tokenizer import OpenAITokenizer
from twotower.models.preprocess import OPENAI_MEAN, OPENAI_STD, ImageInput


def normalised(images: torch.Tensor) -> torch.Tensor:
    mean, std = (torch.tensor(c).view(3, 1, 1) for c in (OPENAI_MEAN, OPENAI_STD))
    return (images / 255 - mean) / std


@pytest.mark.parametrize("architecture", [VIT, RESNET], ids=["vit", "resnet"])
def test_features_equal_the_reference_with_quick_gelu(architecture: Architecture) -> None:
    model = make_clip(architecture)
    weights = to_openai_names(model.state_dict())
    size = architecture.image_size
    images = torch.randint(0, 256, (3, 3, size, size), dtype=torch.uint8)
    tokens = OpenAITokenizer(architecture.context_length)(["a dog", "", "the black cat! 12"])
    encode = (
        reference.encode_image_vit if architecture.patch_size else reference.encode_image_resnet
    )
    with torch.no_grad():
        image_features, text_features = model.encode_image(images), model.encode_text(tokens)
    torch.testing.assert_close(
        image_features, encode(weights, normalised(images)), rtol=1e-4, atol=1e-4
    )
    expected = reference.encode_text(weights, tokens)
    torch.testing.assert_close(text_features, expected, rtol=1e-4, atol=1e-4)
    with_gelu = reference.encode_text(weights, tokens, F.gelu)
    assert (with_gelu - expected).abs().max() > 1e-2, "the test would not see a wrong activation"


@pytest.mark.parametrize("architecture", [VIT, RESNET], ids=["vit", "resnet"])
def test_names_and_architecture_survive_the_round_trip(architecture: Architecture) -> None:
    model = make_clip(architecture)
    weights = to_openai_names(model.state_dict())
    assert infer_architecture(weights) == architecture
    back = from_openai_names(weights)
    assert back.keys() == model.state_dict().keys()
    assert all(torch.equal(back[name], tensor) for name, tensor in model.state_dict().items())


def test_initialisation_is_openais() -> None:
    """The deviations of OpenAI's `CLIP.initialize_parameters` and of its constructors."""
    tiny = ARCHITECTURES["tiny"]
    torch.manual_seed(0)
    model = build_towers(tiny, ImageInput(size=tiny.image_size), quick_gelu=True)
    weights = to_openai_names(model.state_dict())
    width, layers = tiny.text_width, tiny.text_layers
    pool = 32 * tiny.vision_width
    block = "transformer.resblocks.1"
    expected = {
        "token_embedding.weight": 0.02,
        "positional_embedding": 0.01,
        "text_projection": width**-0.5,
        f"{block}.attn.in_proj_weight": width**-0.5,
        f"{block}.attn.out_proj.weight": width**-0.5 * (2 * layers) ** -0.5,
        f"{block}.mlp.c_fc.weight": (2 * width) ** -0.5,
        f"{block}.mlp.c_proj.weight": width**-0.5 * (2 * layers) ** -0.5,
        "visual.attnpool.positional_embedding": pool**-0.5,
        **{f"visual.attnpool.{p}_proj.weight": pool**-0.5 for p in "qkvc"},
    }
    for name, deviation in expected.items():
        assert weights[name].std().item() == pytest.approx(deviation, rel=0.05), name
        assert abs(weights[name].mean().item()) < 0.1 * deviation, name
    for stage in (1, 2, 3, 4):
        assert not weights[f"visual.layer{stage}.0.bn3.weight"].any()
    assert model.logit_scale.exp().item() == pytest.approx(1 / 0.07)


def test_vit_initialisation_is_openais() -> None:
    wide = Architecture(**{**VIT.__dict__, "vision_width": 512, "image_size": 128})
    torch.manual_seed(0)
    model = build_towers(wide, ImageInput(size=128), quick_gelu=True)
    weights = to_openai_names(model.state_dict())
    for name in ("visual.class_embedding", "visual.positional_embedding", "visual.proj"):
        assert weights[name].std().item() == pytest.approx(512**-0.5, rel=0.1), name


@pytest.mark.parametrize("name", list(ARCHITECTURES))
def test_every_architecture_can_be_opened_by_openais_code(name: str) -> None:
    """`clip.build_model` takes one head per 64 channels, and 32 pixels a position of a ResNet."""
    architecture = ARCHITECTURES[name]
    assert architecture.text_width % 64 == 0
    assert architecture.vocab_size == 49408
    if architecture.patch_size:
        assert architecture.vision_width % 64 == 0
        assert architecture.image_size % architecture.patch_size == 0
    else:
        assert architecture.vision_width * 32 % 64 == 0
        assert architecture.image_size % 32 == 0


TEXTS = [
    "a dog on the beach",
    "What's THIS (black)?  ",
    "",
    "日本語 und ümläute &amp; 🐶",
    "word " * 40,
    "internationalisation " * 30,
]


@pytest.mark.parametrize("length", [8, 32, 77])
def test_tokens_equal_those_of_open_clip(length: int) -> None:
    from open_clip.tokenizer import SimpleTokenizer

    assert torch.equal(OpenAITokenizer(length)(TEXTS), SimpleTokenizer()(TEXTS, length))


def test_a_caption_of_ten_thousand_characters_is_cut() -> None:
    letters = "".join(chr(97 + i * i * 7919 % 26) for i in range(10_000))
    start = time.monotonic()
    tokens = OpenAITokenizer(16)([letters, "x " * 5_000])
    assert time.monotonic() - start < 30, "byte pairs of one long word must not take minutes"
    assert tokens.shape == (2, 16)
    assert tokens[:, 0].tolist() == [49406] * 2 and tokens[:, -1].tolist() == [49407] * 2
