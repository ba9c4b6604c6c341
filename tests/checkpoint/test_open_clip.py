from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
from safetensors.torch import save_file

from tests.checkpoint.test_openai import Planted
from tests.models.test_openai_clip import normalised
from tests.models.tiny import ODD, RESNET, VIT, make_clip
from twotower.checkpoint.clip import Architecture, ClipCheckpoint, Pixels
from twotower.checkpoint.open_clip import CONFIG, WEIGHTS, read_open_clip, write_open_clip
from twotower.models.dual_encoder import MODELS, DualEncoder
from twotower.models.openai_clip import to_openai_names
from twotower.models.openai_finetune import OpenaiFinetuneConfig
from twotower.settings import ConfigError

TOKENS = torch.randint(1, 49000, (3, 9))


def clip_from(model: DualEncoder, architecture: Architecture, **fields: Any) -> ClipCheckpoint:
    weights = to_openai_names(model.state_dict())
    values = {"quick_gelu": True, "source": "test", **fields}
    return ClipCheckpoint(weights=weights, architecture=architecture, **values)


def features(model: Any, images: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return torch.cat([model.encode_image(images), model.encode_text(TOKENS)])


@pytest.mark.parametrize("quick_gelu", [True, False], ids=["quick_gelu", "gelu"])
@pytest.mark.parametrize("architecture", [VIT, RESNET, ODD], ids=["vit", "resnet", "odd"])
def test_open_clip_opens_what_is_written_and_it_comes_back_as_it_was(
    architecture: Architecture, quick_gelu: bool, tmp_path: Path
) -> None:
    ours = make_clip(architecture, quick_gelu=quick_gelu)
    pixels = Pixels(mean=(0.5, 0.4, 0.3), interpolation="bilinear")
    written = clip_from(ours, architecture, quick_gelu=quick_gelu, pixels=pixels)
    write_open_clip(tmp_path, written)
    theirs = open_clip.create_model(f"local-dir:{tmp_path}").eval()
    size = architecture.image_size
    images = torch.randint(0, 256, (3, 3, size, size), dtype=torch.uint8)
    expected, found = features(ours, images), features(theirs, normalised(images))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert theirs.visual.image_mean == [0.5, 0.4, 0.3]
    again = read_open_clip(tmp_path)
    assert replace(again, weights={}, source="") == replace(written, weights={}, source="")
    assert all(torch.equal(again.weights[name], written.weights[name]) for name in written.weights)


@pytest.mark.parametrize("custom_text", [False, True])
def test_what_open_clip_saves_gives_equal_features_here(custom_text: bool, tmp_path: Path) -> None:
    """Both of open_clip's classes; half of LAION's models are of the second and use GELU."""
    config: dict[str, Any] = {
        "embed_dim": 20,
        "custom_text": custom_text,
        "vision_cfg": {
            "image_size": 32,
            "layers": 2,
            "width": 48,
            "patch_size": 8,
            "head_width": 12,
        },
        "text_cfg": {"context_length": 9, "width": 40, "heads": 4, "layers": 2, "mlp_ratio": 2.3},
    }
    (tmp_path / CONFIG).write_text(json.dumps({"model_cfg": config, "preprocess_cfg": {}}))
    torch.manual_seed(0)
    theirs = open_clip.create_model(f"local-dir:{tmp_path}").eval()
    torch.save(theirs.state_dict(), tmp_path / "open_clip_pytorch_model.bin")
    for weights in (tmp_path, tmp_path / "open_clip_pytorch_model.bin"):
        bundle = MODELS.build(OpenaiFinetuneConfig(weights=str(weights)))
        assert bundle.assets["activation"] == "gelu"
        images = torch.randint(0, 256, (3, 3, 32, 32), dtype=torch.uint8)
        found = features(bundle.model.eval(), images)
        torch.testing.assert_close(
            found, features(theirs, normalised(images)), rtol=1e-5, atol=1e-5
        )


def test_a_bias_of_a_sigmoid_loss_goes_with_the_weights(tmp_path: Path) -> None:
    clip = clip_from(make_clip(VIT), VIT)
    clip.weights["logit_bias"] = torch.tensor(-10.0)
    write_open_clip(tmp_path, clip)
    assert open_clip.create_model(f"local-dir:{tmp_path}").logit_bias.item() == -10
    MODELS.build(OpenaiFinetuneConfig(weights=str(tmp_path)))


def test_checkpoints_of_open_clips_training_are_read(tmp_path: Path) -> None:
    clip = clip_from(make_clip(VIT), VIT, quick_gelu=False)
    write_open_clip(tmp_path, clip)
    (tmp_path / WEIGHTS).unlink()
    named = {f"module.{name}": tensor for name, tensor in clip.weights.items()}
    torch.save({"epoch": 3, "state_dict": named}, tmp_path / "epoch_3.pt")
    found = read_open_clip(tmp_path, tmp_path / "epoch_3.pt")
    assert not found.quick_gelu
    assert all(torch.equal(found.weights[name], clip.weights[name]) for name in clip.weights)


def test_what_cannot_be_held_or_read_gets_one_sentence(tmp_path: Path) -> None:
    clip = clip_from(make_clip(VIT), VIT)
    write_open_clip(tmp_path, clip)
    path = tmp_path / CONFIG
    plain = path.read_text()
    changes: dict[str, dict[str, Any]] = {
        "asks for vision_cfg.timm_model_name, which OpenAI's": {
            "vision_cfg": {"timm_model_name": "resnet50"}
        },
        "asks for multimodal_cfg, text_cfg.pool_type, which": {
            "multimodal_cfg": {},
            "text_cfg": {"pool_type": "last"},
        },
        "says image_size 224, but the weights beside it are for 32": {
            "vision_cfg": {"image_size": 224}
        },
        "64 channels do not divide into 5 heads": {"text_cfg": {"heads": 5}},
        "gives 'x' where a positive whole number belongs": {"vision_cfg": {"head_width": "x"}},
    }
    for sentence, change in changes.items():
        config = json.loads(plain)
        for key, value in change.items():
            config["model_cfg"][key] = {**config["model_cfg"].get(key, {}), **value}
        path.write_text(json.dumps(config))
        with pytest.raises(ConfigError, match=sentence):
            read_open_clip(tmp_path)
    config = json.loads(plain)
    config["preprocess_cfg"]["resize_mode"] = "squash"
    path.write_text(json.dumps(config))
    with pytest.raises(ConfigError, match="resize_mode squash and interpolation bicubic"):
        read_open_clip(tmp_path)
    path.write_text('{"model_cfg": {}}')
    with pytest.raises(ConfigError, match="has no model_cfg with a vision_cfg and a text_cfg"):
        read_open_clip(tmp_path)
    path.write_text(plain)
    (tmp_path / WEIGHTS).write_bytes((tmp_path / WEIGHTS).read_bytes()[:5000])
    with pytest.raises(ConfigError, match="read as a file of open_clip's weights: it is truncated"):
        read_open_clip(tmp_path)
    (tmp_path / WEIGHTS).unlink()
    with pytest.raises(ConfigError, match="holds no weights; open_clip's are in"):
        read_open_clip(tmp_path)
    for name in ("a", "b"):
        save_file({"x": torch.ones(1)}, tmp_path / f"{name}.safetensors")
    with pytest.raises(ConfigError, match="holds several files of weights"):
        read_open_clip(tmp_path)


def test_a_planted_command_is_refused_and_not_run(tmp_path: Path) -> None:
    write_open_clip(tmp_path, clip_from(make_clip(VIT), VIT))
    (tmp_path / WEIGHTS).unlink()
    torch.save({"x": Planted(tmp_path / "marker")}, tmp_path / "open_clip_pytorch_model.bin")
    with pytest.raises(ConfigError, match=r"was refused: it asks to run \w+.system"):
        read_open_clip(tmp_path)
    assert not (tmp_path / "marker").exists()
