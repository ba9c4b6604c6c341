from __future__ import annotations

import os
import pickle
import warnings
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from twotower.checkpoint.clip import Architecture, infer_architecture
from twotower.checkpoint.openai import read_openai, write_openai
from twotower.settings import ConfigError


class Planted:
    """Runs a command when it is unpickled in earnest."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.system, (f"touch {self.marker}",)


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.attn = nn.MultiheadAttention(width, 1)
        self.ln_1 = nn.LayerNorm(width)
        self.sizes = [1, 2]
        self.name = "block"

    def forward(self, x: Tensor) -> Tensor:
        return self.ln_1(x) * len(self.sizes)


class Transformer(nn.Module):
    def __init__(self, width: int, layers: int) -> None:
        super().__init__()
        self.resblocks = nn.Sequential(*[Block(width) for _ in range(layers)])

    def forward(self, x: Tensor) -> Tensor:
        return self.resblocks(x)


class Visual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 6, 4, 4, bias=False)
        self.positional_embedding = nn.Parameter(torch.randn(10, 6))
        self.transformer = Transformer(6, 3)
        self.proj = nn.Parameter(torch.randn(6, 5))

    def forward(self, x: Tensor) -> Tensor:
        return self.transformer(self.conv1(x).flatten(2).transpose(1, 2)) @ self.proj


class Clip(nn.Module):
    """Shaped like OpenAI's CLIP where the names and the inference of the architecture look."""

    def __init__(self) -> None:
        super().__init__()
        self.visual = Visual()
        self.transformer = Transformer(8, 2)
        self.token_embedding = nn.Embedding(11, 8)
        self.positional_embedding = nn.Parameter(torch.randn(7, 8))
        self.ln_final = nn.LayerNorm(8)
        self.text_projection = nn.Parameter(torch.randn(8, 5))
        self.logit_scale = nn.Parameter(torch.tensor(2.5))
        self.register_buffer("input_resolution", torch.tensor(12))
        self.register_buffer("context_length", torch.tensor(7))
        self.register_buffer("vocab_size", torch.tensor(11))
        self.attn_mask = torch.zeros(7, 7)

    def forward(self, image: Tensor, text: Tensor) -> tuple[Tensor, Tensor]:
        tokens = self.token_embedding(text) + self.positional_embedding
        tokens = self.transformer(tokens + self.attn_mask.sum())
        return self.visual(image), self.ln_final(tokens) @ self.text_projection * self.logit_scale


EXPECTED = Architecture(
    embed_dim=5,
    image_size=12,
    vision_layers=3,
    vision_width=6,
    patch_size=4,
    context_length=7,
    vocab_size=11,
    text_width=8,
    text_layers=2,
)


def weights_of(model: nn.Module) -> dict[str, Tensor]:
    dropped = ("input_resolution", "context_length", "vocab_size")
    return {k: v for k, v in model.state_dict().items() if k not in dropped}


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype and torch.equal(found[name], tensor), name


@pytest.fixture
def model() -> Clip:
    torch.manual_seed(0)
    return Clip()


@pytest.fixture
def archive(model: Clip, tmp_path: Path) -> Path:
    """What OpenAI publishes: half precision, saved by TorchScript."""
    model.visual.half()
    path = tmp_path / "jit.pt"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.save(torch.jit.script(model), path)
    return path


def test_an_archive_gives_the_state_dict_without_running_it(
    model: Clip, archive: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.jit.load", None)
    found = read_openai(archive)
    assert_same(found, weights_of(model))
    assert found["visual.conv1.weight"].dtype == torch.float16
    assert infer_architecture(found) == EXPECTED


def test_a_traced_archive_is_read_too(model: Clip, tmp_path: Path) -> None:
    path = tmp_path / "traced.pt"
    example = (torch.randn(1, 3, 12, 12), torch.zeros(1, 7, dtype=torch.int64))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.save(torch.jit.trace(model.eval(), example), path)
    assert_same(read_openai(path), weights_of(model))


def test_state_dicts_are_read_plain_and_as_training_programs_save_them(
    model: Clip, tmp_path: Path
) -> None:
    torch.save(model.state_dict(), tmp_path / "plain.pt")
    named = {f"module.{name}": tensor for name, tensor in model.state_dict().items()}
    torch.save({"epoch": 3, "state_dict": named}, tmp_path / "trained.pt")
    for name in ("plain.pt", "trained.pt"):
        assert_same(read_openai(tmp_path / name), weights_of(model))


def test_a_planted_command_is_refused_by_name_and_not_run(
    model: Clip, archive: Path, tmp_path: Path
) -> None:
    marker = tmp_path / "marker"
    in_state_dict = tmp_path / "planted.pt"
    torch.save({**model.state_dict(), "x": Planted(marker)}, in_state_dict)
    in_archive = tmp_path / "planted_jit.pt"
    with zipfile.ZipFile(archive) as source, zipfile.ZipFile(in_archive, "w") as target:
        for name in source.namelist():
            data = source.read(name)
            if name.endswith("/data.pkl"):
                data = pickle.dumps(Planted(marker), protocol=2)
            target.writestr(name, data)
    for path in (in_state_dict, in_archive):
        with pytest.raises(ConfigError) as raised:
            read_openai(path)
        assert str(raised.value) == (
            f"{path} was refused: it asks to run {os.system.__module__}.system, "
            "which no CLIP checkpoint needs"
        )
    assert not marker.exists()


def test_what_is_no_clip_gets_one_sentence(model: Clip, archive: Path, tmp_path: Path) -> None:
    plain = tmp_path / "plain.pt"
    torch.save(model.state_dict(), plain)
    cut_plain, cut_archive = tmp_path / "cut.pt", tmp_path / "cut_jit.pt"
    cut_plain.write_bytes(plain.read_bytes()[:2000])
    cut_archive.write_bytes(archive.read_bytes()[:2000])
    text = tmp_path / "text.pt"
    text.write_text("nothing")
    other = tmp_path / "other.pt"
    torch.save({"fc.weight": torch.ones(2)}, other)
    broken = "{} cannot be read as a file in OpenAI's format: it is truncated"
    sentences = {
        tmp_path / "none.pt": "{} does not exist; it should be a file in OpenAI's format",
        tmp_path: "{} is a folder; it should be a file in OpenAI's format",
        cut_plain: broken,
        cut_archive: broken,
        text: broken,
        other: "{} does not hold a CLIP in OpenAI's format: ln_final.weight, ",
    }
    for path, sentence in sentences.items():
        with pytest.raises(ConfigError) as raised:
            read_openai(path)
        assert str(raised.value).startswith(sentence.format(path)), str(raised.value)


def test_written_files_are_read_back_equal_and_in_half_as_openai_rounds(
    model: Clip, tmp_path: Path
) -> None:
    weights = weights_of(model)
    write_openai(tmp_path / "fp32.pt", weights)
    assert_same(read_openai(tmp_path / "fp32.pt"), weights)
    write_openai(tmp_path / "fp16.pt", weights, torch.float16)
    found = read_openai(tmp_path / "fp16.pt")
    full = {name for name, tensor in found.items() if tensor.dtype == torch.float32}
    assert full == {name for name in weights if "ln_" in name} | {
        "logit_scale",
        "positional_embedding",
        "token_embedding.weight",
        "visual.positional_embedding",
    }
    for name, tensor in weights.items():
        assert torch.equal(found[name], tensor.to(found[name].dtype))


def test_a_slice_is_written_without_the_storage_behind_it(model: Clip, tmp_path: Path) -> None:
    weights = weights_of(model)
    write_openai(tmp_path / "small.pt", weights)
    weights["text_projection"] = torch.zeros(1000, 1000)[:8, :5]
    write_openai(tmp_path / "slice.pt", weights)
    small, sliced = (os.path.getsize(tmp_path / f"{name}.pt") for name in ("small", "slice"))
    assert sliced < small + 4096


def test_a_resnet_is_inferred_from_its_names() -> None:
    shapes = {
        "visual.conv1.weight": (8, 3, 3, 3),
        "visual.layer1.0.conv1.weight": (16, 16, 1, 1),
        "visual.layer2.0.conv1.weight": (1,),
        "visual.layer2.1.conv1.weight": (1,),
        "visual.layer3.0.conv1.weight": (1,),
        "visual.layer4.0.conv1.weight": (1,),
        "visual.attnpool.positional_embedding": (50, 512),
        "text_projection": (64, 20),
        "positional_embedding": (77, 64),
        "token_embedding.weight": (100, 64),
        "ln_final.weight": (64,),
        "transformer.resblocks.0.ln_1.weight": (64,),
    }
    found = infer_architecture({name: torch.zeros(shape) for name, shape in shapes.items()})
    assert found == Architecture(
        embed_dim=20,
        image_size=224,
        vision_layers=(1, 2, 1, 1),
        vision_width=16,
        patch_size=0,
        vocab_size=100,
        text_width=64,
        text_layers=1,
    )
    del shapes["positional_embedding"]
    with pytest.raises(ConfigError, match="positional_embedding"):
        infer_architecture({name: torch.zeros(shape) for name, shape in shapes.items()})
