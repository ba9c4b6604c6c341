"""Our loader and our export against OpenAI's own code, the package `clip`.

It runs in an environment of its own, `.venv-parity`, since `clip` needs an old setuptools:
`scripts/test.sh --all` makes it, and fails without it.
"""

from __future__ import annotations

import io
import os
import pickle
import warnings
import zipfile
from pathlib import Path
from typing import Any

import clip
import pytest
import torch
from clip.model import CLIP, build_model
from PIL import Image
from torch import Tensor

from tests.helpers import write_pictures
from tests.models.tiny import clip_bundle
from twotower.checkpoint.clip import Architecture
from twotower.checkpoint.openai import in_half, read_openai
from twotower.config import ExportFormat
from twotower.export.formats import export_bundle
from twotower.export.probe import make_probe
from twotower.models.dual_encoder import MODELS, ModelBundle
from twotower.models.openai_clip import load_openai_weights, to_openai_names
from twotower.models.openai_finetune import OpenaiFinetuneConfig
from twotower.settings import ConfigError

CAPTIONS = ["a dog on the beach", "", "It's a Café; über 30% of them!", "two " * 40 + "cats"]
# (embed_dim, image_resolution, vision_layers, vision_width, vision_patch_size, context_length,
# vocab_size, transformer_width, transformer_heads, transformer_layers), as CLIP takes them.
SIZES: dict[str, tuple[Any, ...]] = {
    "ViT": (48, 64, 3, 128, 16, 77, 49408, 64, 1, 3),
    "RN": (48, 96, (2, 1, 2, 1), 16, None, 77, 49408, 128, 2, 2),
}


def assert_equal(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


def make_theirs(kind: str) -> CLIP:
    """OpenAI's model with random weights in which every tensor matters, in half as published."""
    torch.manual_seed(0)
    model = CLIP(*SIZES[kind])
    for name, tensor in model.state_dict().items():
        if tensor.is_floating_point() and name != "logit_scale":
            noise = torch.rand_like(tensor) if "running_var" in name else torch.randn_like(tensor)
            tensor.add_(0.02 * noise)
    clip.model.convert_weights(model)
    return model.eval()


def pictures(folder: Path) -> list[Image.Image]:
    return [Image.open(path) for path, _ in write_pictures(folder, 4, size=150)]


def their_features(model: CLIP, prepare: Any, images: list[Image.Image], length: int) -> Any:
    tokens = clip.tokenize(CAPTIONS, context_length=length, truncate=True)
    with torch.no_grad():
        inputs = torch.stack([prepare(image) for image in images])
        return model.encode_image(inputs), model.encode_text(tokens)


def our_features(bundle: ModelBundle, pixels: Tensor) -> tuple[Tensor, Tensor]:
    with torch.no_grad():
        bundle.model.eval()
        of_texts = bundle.model.encode_text(bundle.tokenizer(CAPTIONS))
        return bundle.model.encode_image(pixels), of_texts


def square(images: list[Image.Image], size: int) -> tuple[list[Image.Image], Tensor]:
    """Pictures of a tower's size, which no side resizes, and their pixels.

    OpenAI resizes with Pillow and twotower with torch, which round some pixels up or down by one.
    """
    small = [image.resize((size, size)) for image in images]
    rows = [torch.tensor(list(image.tobytes()), dtype=torch.uint8) for image in small]
    return small, torch.stack([row.view(size, size, 3).permute(2, 0, 1) for row in rows])


@pytest.mark.parametrize("kind", SIZES)
def test_our_loader_gives_the_features_of_their_model(kind: str, tmp_path: Path) -> None:
    """A state dict of random weights: `clip.model.build_model` beside `model.weights=`."""
    torch.save(make_theirs(kind).state_dict(), tmp_path / "clip.pt")
    theirs = build_model(torch.load(tmp_path / "clip.pt", weights_only=True)).float().eval()
    prepare = clip.clip._transform(theirs.visual.input_resolution)
    bundle = MODELS.build(OpenaiFinetuneConfig(weights=str(tmp_path / "clip.pt")))
    images, pixels = square(pictures(tmp_path / "pictures"), SIZES[kind][1])
    for found, expected in zip(
        our_features(bundle, pixels), their_features(theirs, prepare, images, 77), strict=True
    ):
        assert_equal(found, expected)
        assert expected.std() > 1e-2, "features of nothing would be equal too"
    assert bundle.model.logit_scale == theirs.logit_scale


@pytest.mark.parametrize("kind", SIZES)
def test_our_loader_reads_an_archive_as_theirs_does(kind: str, tmp_path: Path) -> None:
    """TorchScript, which is what OpenAI publishes: theirs compiles it, ours reads the tensors."""
    path = tmp_path / "archive.pt"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = make_theirs(kind).float()
        size, tokens = SIZES[kind][1], clip.tokenize(["a dog"])
        # Not a part of the model, but of the archives; the loader deletes it.
        model.input_resolution = torch.tensor(size)
        traced = torch.jit.trace(model, (torch.zeros(1, 3, size, size), tokens))
        torch.jit.save(traced, path)
        theirs, _ = clip.load(str(path), device="cpu")
    bundle = MODELS.build(OpenaiFinetuneConfig(weights=str(path)))
    images, pixels = square(pictures(tmp_path / "pictures"), size)
    prepare = clip.clip._transform(size)
    for found, expected in zip(
        our_features(bundle, pixels), their_features(theirs, prepare, images, 77), strict=True
    ):
        assert_equal(found, expected)


@pytest.mark.parametrize("exact", [True, False], ids=["half", "full"])
@pytest.mark.parametrize("kind", SIZES)
def test_clip_load_opens_what_we_export(kind: str, exact: bool, tmp_path: Path) -> None:
    """Weights that fit half precision come out equal; others as `clip.load` rounds them."""
    source, path = tmp_path / "source.pt", tmp_path / "export.pt"
    torch.save(make_theirs(kind).state_dict(), source)
    bundle = MODELS.build(OpenaiFinetuneConfig(weights=str(source)))
    if not exact:
        with torch.no_grad():
            for parameter in bundle.model.parameters():
                parameter.mul_(1.0001)
    probe = make_probe(bundle, tmp_path / "best.safetensors")
    export_bundle(bundle, ExportFormat.openai, path, probe)
    theirs, prepare = clip.load(str(path), device="cpu")
    if not exact:
        load_openai_weights(bundle.model, in_half(read_openai(path)), path)
    images, pixels = square(pictures(tmp_path / "pictures"), SIZES[kind][1])
    for found, expected in zip(
        their_features(theirs, prepare, images, 77), our_features(bundle, pixels), strict=True
    ):
        assert_equal(found, expected)


def test_a_short_context_is_opened_too(tmp_path: Path) -> None:
    """`tiny` has 32 tokens; `clip.tokenize` is told so."""
    size = 64
    architecture = Architecture(
        embed_dim=24,
        image_size=size,
        vision_layers=(1, 1, 1, 1),
        vision_width=16,
        patch_size=0,
        context_length=32,
        text_width=64,
        text_layers=1,
    )
    bundle = clip_bundle(architecture)
    load_openai_weights(bundle.model, in_half(to_openai_names(bundle.model.state_dict())), "")
    path = tmp_path / "tiny.pt"
    probe = make_probe(bundle, tmp_path / "best.safetensors")
    export_bundle(bundle, ExportFormat.openai, path, probe)
    theirs, prepare = clip.load(str(path), device="cpu")
    images, pixels = square(pictures(tmp_path / "pictures"), size)
    for found, expected in zip(
        their_features(theirs, prepare, images, 32), our_features(bundle, pixels), strict=True
    ):
        assert_equal(found, expected)


def test_their_preparation_of_pictures_is_ours_up_to_rounding(tmp_path: Path) -> None:
    """The same crop; pixels differ by one level here and there."""
    torch.save(make_theirs("ViT").state_dict(), tmp_path / "clip.pt")
    bundle = MODELS.build(OpenaiFinetuneConfig(weights=str(tmp_path / "clip.pt")))
    prepare = clip.clip._transform(64)
    norm = bundle.model.image_tower.trunk[0]
    images = [image.resize((170, 120)) for image in pictures(tmp_path / "pictures")]
    for image in images:
        ours = norm(bundle.eval_transform(image)[None])[0]
        difference = (ours - prepare(image)).abs()
        assert difference.max() < 1.5 / 255 / 0.26


class Planted:
    """Runs a command when it is unpickled in earnest."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.system, (f"touch {self.marker}",)


@pytest.mark.parametrize("kind", ["state dict", "archive"])
def test_a_planted_command_is_refused_without_running(kind: str, tmp_path: Path) -> None:
    """In the pickle of a state dict, and in the `data.pkl` of an archive that `clip` would open."""
    marker, path = tmp_path / "marker", tmp_path / "planted.pt"
    if kind == "state dict":
        torch.save({**make_theirs("ViT").state_dict(), "x": Planted(marker)}, path)
    else:
        plain = io.BytesIO()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch.jit.save(torch.jit.script(torch.nn.Linear(2, 2)), plain)
        with zipfile.ZipFile(plain) as source, zipfile.ZipFile(path, "w") as target:
            for name in source.namelist():
                data = source.read(name)
                planted = pickle.dumps(Planted(marker), protocol=2)
                target.writestr(name, planted if name.endswith("/data.pkl") else data)
    with pytest.raises(ConfigError, match=r"was refused: it asks to run \w+.system, which no CLIP"):
        MODELS.build(OpenaiFinetuneConfig(weights=str(path)))
    assert not marker.exists()
