from __future__ import annotations

import copy
import json
import pickle
import shutil
from pathlib import Path

import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import AutoTokenizer, BertModel

from tests.models.tiny import bert_config, write_bert
from twotower.model_config import BatchNorm
from twotower.models.bert_resnet import BertResnetConfig, HeadKind
from twotower.models.dual_encoder import MODELS, ModelBundle
from twotower.models.huggingface_text import Pooling
from twotower.settings import ConfigError

CAPTIONS = ["a dog", "the cats on the beach!", "", "zebra"]


def build(config: BertResnetConfig) -> ModelBundle:
    torch.manual_seed(1)
    return MODELS.build(config)


def pictures(size: int, count: int = 2) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (count, 3, size, size), dtype=torch.uint8, generator=generator)


@pytest.mark.parametrize("pooling", list(Pooling))
def test_text_features_equal_hugging_faces_own(bert: Path, pooling: Pooling) -> None:
    bundle = build(bert_config(bert, pooling=pooling))
    tokens = bundle.tokenizer(CAPTIONS)
    theirs = AutoTokenizer.from_pretrained(bert)(
        CAPTIONS, padding="max_length", max_length=12, truncation=True, return_tensors="pt"
    )
    assert torch.equal(tokens, theirs["input_ids"])
    model = BertModel.from_pretrained(bert).eval()
    bundle.model.eval()
    with torch.no_grad():
        hidden = model(
            input_ids=theirs["input_ids"], attention_mask=theirs["attention_mask"]
        ).last_hidden_state
        expected = hidden[:, 0]
        if pooling is Pooling.mean:
            lengths = theirs["attention_mask"].sum(1)
            expected = torch.stack(
                [row[:n].mean(0) for row, n in zip(hidden, lengths, strict=True)]
            )
        found = bundle.model.text_tower.trunk(tokens)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("encoder", "size"), [("test_resnet", 40), ("test_vit", 64), ("test_efficientnet", 33)]
)
def test_image_features_equal_timms_own_at_any_size(bert: Path, encoder: str, size: int) -> None:
    bundle = build(bert_config(bert, image_encoder=encoder, image_size=size))
    trunk = bundle.model.image_tower.trunk
    reference = timm.create_model(encoder, pretrained=False, num_classes=0).eval()
    if encoder == "test_vit":
        reference.set_input_size(img_size=(size, size))
    reference.load_state_dict(trunk[1].state_dict())
    mean, std = (torch.tensor(reference.pretrained_cfg[k]).view(3, 1, 1) for k in ("mean", "std"))
    images = pictures(size)
    bundle.model.eval()
    with torch.no_grad():
        expected = reference((images / 255 - mean) / std)
        torch.testing.assert_close(trunk(images), expected)
    assert bundle.model(images, bundle.tokenizer(["a"] * 2)).image_features.shape == (2, 20)
    assert bundle.model.image_tower.head[-1].out_features == 20
    assert bundle.eval_transform.size == bundle.train_transform.size == size


def test_heads_fit_the_trunks_and_are_what_the_config_says(bert: Path) -> None:
    linear = build(bert_config(bert)).model
    assert [type(part) for part in linear.text_tower.head] == [nn.LayerNorm, nn.Dropout, nn.Linear]
    assert linear.text_tower.head[2].weight.shape == (20, 32)
    config = bert_config(bert, head=HeadKind.mlp, head_width=17, head_dropout=0.25)
    head = build(config).model.text_tower.head
    shapes = [tuple(part.weight.shape) for part in head if isinstance(part, nn.Linear)]
    assert shapes == [(17, 32), (20, 17)]
    assert head[3].p == 0.25


def trained(bundle: ModelBundle, tower: str) -> set[str]:
    found = [n for n, p in bundle.model.named_parameters() if p.requires_grad]
    prefix = f"{tower}_tower.trunk."
    return {name.removeprefix(prefix) for name in found if name.startswith(prefix)}


def test_locked_up_to_a_stage_trains_just_the_last_ones(bert: Path) -> None:
    bundle = build(bert_config(bert, text_unlocked_stages=1, image_unlocked_stages=2))
    assert trained(bundle, "text") and all(
        name.startswith("encoder.encoder.layer.2.") for name in trained(bundle, "text")
    )
    groups = {name.split(".")[1] for name in trained(bundle, "image")}
    assert groups == {"layer3", "layer4"}
    everything = build(bert_config(bert, text_unlocked_stages=4, image_unlocked_stages=5))
    free = build(bert_config(bert))
    for tower in ("text", "image"):
        assert trained(everything, tower) == trained(free, tower) != set()
    locked = build(bert_config(bert, text_unlocked_stages=0, image_unlocked_stages=0))
    assert trained(locked, "text") == trained(locked, "image") == set()
    assert locked.model.text_tower.locked and locked.model.image_tower.locked
    assert not bundle.model.text_tower.locked
    heads = {n for n, p in locked.model.named_parameters() if p.requires_grad}
    assert heads == {n for n in heads if ".head." in n} | {"logit_scale"}


@pytest.mark.parametrize("unlocked", [0, 2])
def test_a_training_step_leaves_locked_stages_as_they_were(bert: Path, unlocked: int) -> None:
    bundle = build(bert_config(bert, image_unlocked_stages=unlocked, text_unlocked_stages=unlocked))
    model = bundle.model
    before = copy.deepcopy(model.state_dict())
    model.train()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0)
    output = model(pictures(32, 4), bundle.tokenizer(CAPTIONS))
    (output.image_features * output.text_features).sum().mul(output.logit_scale).backward()
    assert all(p.grad is not None for n, p in model.named_parameters() if p.requires_grad)
    optimizer.step()
    changed = {n for n, t in model.state_dict().items() if not torch.equal(t, before[n])}
    may_change = ("head.", "layer3.", "layer4.", "layer.1.", "layer.2.", "logit_scale")
    assert all(any(part in name for part in may_change) for name in changed)
    running = {name for name in changed if "running_mean" in name}
    assert bool(running) == (unlocked > 0)


def test_locked_text_layers_drop_nothing_in_training(bert: Path) -> None:
    trunk = build(bert_config(bert, text_unlocked_stages=1)).model.text_tower.trunk
    trunk.train()
    tokens = torch.tensor([[2, 4, 5, 3, 0, 0]])
    seen: list[Tensor] = []
    trunk.encoder.encoder.layer[1].register_forward_hook(
        lambda module, inputs, output: seen.append(output)
    )
    first, second = trunk(tokens), trunk(tokens)
    assert torch.equal(seen[0], seen[1]), "the locked layers must not use dropout"
    assert not torch.equal(first, second), "the trained layer must use dropout"


def test_the_pooler_is_dropped_so_that_every_trained_parameter_gets_a_gradient(bert: Path) -> None:
    bundle = build(bert_config(bert))
    output = bundle.model(pictures(32, 4), bundle.tokenizer(CAPTIONS))
    (output.image_features * output.text_features).sum().mul(output.logit_scale).backward()
    missing = [name for name, p in bundle.model.named_parameters() if p.grad is None]
    assert missing == []


@pytest.fixture
def weights(tmp_path: Path) -> dict[str, Tensor]:
    torch.manual_seed(7)
    model = timm.create_model("test_resnet", pretrained=False)
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


CONSTANTS = {
    "mean": [0.25, 0.5, 0.75],
    "std": [0.1, 0.2, 0.4],
    "interpolation": "bilinear",
    "input_size": [3, 48, 48],
}


def test_a_local_file_brings_its_own_constants(
    bert: Path, tmp_path: Path, weights: dict[str, Tensor]
) -> None:
    safe, pth = tmp_path / "w.safetensors", tmp_path / "w.pth"
    save_file(weights, safe, {key: json.dumps(value) for key, value in CONSTANTS.items()})
    torch.save({"state_dict": {f"module.{k}": v for k, v in weights.items()}}, pth)
    (tmp_path / "w.pth.json").write_text(json.dumps(CONSTANTS))
    for path in (safe, pth):
        bundle = build(bert_config(bert, image_weights=str(path), image_size=0))
        norm, trunk = bundle.model.image_tower.trunk
        assert norm.mean == pytest.approx(tuple(CONSTANTS["mean"]))
        assert norm.std == pytest.approx(tuple(CONSTANTS["std"]))
        assert bundle.eval_transform.size == 48
        assert bundle.eval_transform.interpolation.name == "bilinear"
        for name, tensor in trunk.state_dict().items():
            assert torch.equal(tensor, weights[name]), name
    config = bert_config(
        bert, image_weights=str(safe), image_size=40, image_mean=[0.5] * 3, image_std=[1.0] * 3
    )
    norm = build(config).model.image_tower.trunk[0]
    assert norm.mean == (0.5,) * 3 and norm.std == (1.0,) * 3
    bare = tmp_path / "bare.safetensors"
    save_file(weights, bare)
    norm = build(bert_config(bert, image_weights=str(bare))).model.image_tower.trunk[0]
    default = timm.create_model("test_resnet").pretrained_cfg["mean"]
    assert norm.mean == pytest.approx(tuple(default))


def test_training_pictures_may_be_smaller(bert: Path) -> None:
    bundle = build(bert_config(bert, image_size=64, train_image_size=40))
    picture = Image.new("RGB", (90, 70))
    assert bundle.eval_transform(picture).shape == (3, 64, 64)
    train = bundle.train_transform(picture)
    assert train.shape == (3, 40, 40)
    assert bundle.model.encode_image(train[None], normalize=True).shape[0] == 1


def test_image_weights_that_do_not_fit_get_a_sentence(
    bert: Path, tmp_path: Path, weights: dict[str, Tensor]
) -> None:
    class Code:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return print, ("run",)

    save_file({"a": torch.ones(1)}, tmp_path / "other.safetensors")
    (tmp_path / "cut.safetensors").write_bytes(b"\x00" * 20)
    torch.save({"code": Code()}, tmp_path / "code.pth")
    del weights["layer1.0.conv1.weight"]
    save_file(weights, tmp_path / "incomplete.safetensors")
    sentences = {
        "none.safetensors": "no such file: .*; `twotower prepare backbones` lays out",
        "other.safetensors": "does not hold the weights of test_resnet",
        "incomplete.safetensors": "does not hold .*layer1.0.conv1.weight",
        "cut.safetensors": "cannot be read: it is truncated",
        "code.pth": "cannot be read: it is truncated, or not a .safetensors or .pth file of plain",
    }
    for name, sentence in sentences.items():
        with pytest.raises(ConfigError, match=sentence) as raised:
            build(bert_config(bert, image_weights=str(tmp_path / name)))
        assert "\n" not in str(raised.value)
    with pytest.raises(ConfigError, match="the weights of test_resnet cannot be downloaded"):
        build(bert_config(bert, image_weights=""))


def test_text_encoders_that_do_not_fit_get_a_sentence(bert: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    no_pad = write_bert(tmp_path / "no_pad", pad_token=None)
    other = shutil.copytree(bert, tmp_path / "other")
    wide = json.loads((other / "config.json").read_text()) | {"num_hidden_layers": 5}
    (other / "config.json").write_text(json.dumps(wide))
    hub = "has nothing called so"
    sentences = {
        str(tmp_path / "none"): "no such folder: .*; `twotower prepare backbones`",
        "./bert": "no such folder",
        "models/pretrained/none": "no such folder",
        hub.replace(" ", "-"): "model.text_encoder=has-nothing-called-so cannot be loaded: ",
        str(tmp_path / "empty"): "model.text_encoder=.*empty cannot be loaded: ",
        str(no_pad): "has a tokenizer without a padding token",
        str(other): r"has no weights for 32 of its tensors \(encoder.layer.",
    }
    for name, sentence in sentences.items():
        with pytest.raises(ConfigError, match=sentence) as raised:
            build(bert_config(Path(name), text_encoder=name))
        assert "\n" not in str(raised.value)


def test_settings_that_do_not_fit_get_a_sentence(bert: Path) -> None:
    for fields, sentence in [
        ({"text_length": 41}, "model.text_length is 41, but .* has positions for 40 tokens"),
        ({"image_encoder": "resnet5"}, "timm has no model 'resnet5'; did you mean resnet5"),
        ({"image_encoder": "resnet18.nothing"}, "Invalid pretrained tag"),
        ({"image_unlocked_stages": 9}, "model.image_unlocked_stages is 9, but .* has 5 stages"),
        ({"text_unlocked_stages": 5}, "model.text_unlocked_stages is 5, but .* has 4 stages"),
        ({"batch_norm": BatchNorm.frozen}, "model.batch_norm=frozen keeps running statistics"),
        ({"image_mean": [0.5]}, "model.image_mean must be three numbers"),
        (
            {"image_encoder": "test_vit", "image_size": 64, "train_image_size": 40},
            "model.train_image_size: this image encoder cannot take 40 pixels",
        ),
    ]:
        with pytest.raises(ConfigError, match=sentence):
            build(bert_config(bert, **fields))
    frozen = {"batch_norm": BatchNorm.frozen}
    build(bert_config(bert, image_unlocked_stages=0, **frozen))
    build(bert_config(bert, image_encoder="test_vit", image_size=64, **frozen))


def test_a_long_caption_is_cut_and_the_tokenizer_can_be_sent_to_workers(bert: Path) -> None:
    tokenizer = build(bert_config(bert)).tokenizer
    tokens = tokenizer(["dog " * 2500, "x" * 10_000])
    assert tokens.shape == (2, 12)
    assert tokens[0].tolist() == [2] + [5] * 10 + [3]
    assert tokens[1].tolist() == [2, 1, 3] + [0] * 9
    again = pickle.loads(pickle.dumps(tokenizer))
    assert again == tokenizer and torch.equal(again(CAPTIONS), tokenizer(CAPTIONS))
    assert tokenizer([]).shape == (0, 12)
