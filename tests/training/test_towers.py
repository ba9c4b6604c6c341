"""Checkpointed and compiled encoders give the gradients of plain ones."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from tests.helpers import tiny_bundle
from tests.models.tiny import RESNET, VIT, bert_config, make_clip, write_bert
from twotower.model_config import BatchNorm
from twotower.models.compiled import compile_towers
from twotower.models.dual_encoder import MODELS, DualEncoder
from twotower.models.locking import apply_batch_norm_policy
from twotower.settings import ConfigError
from twotower.train_config import TrainConfig
from twotower.training.loss import LOSSES, ClipLossConfig
from twotower.training.stepper import Stepper
from twotower.training.towers import enable_grad_checkpointing, encode_in_parts

CPU = torch.device("cpu")
VARIANTS = ["openai_vit", "openai_resnet", "bert_resnet", "bert_vit", "bert_locked", "bert_lora"]


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_bert(tmp_path_factory.mktemp("bert"))


def make(variant: str, bert: Path) -> tuple[DualEncoder, Tensor, Tensor]:
    """A model in fp64 without dropout, pictures and tokens."""
    torch.manual_seed(0)
    if variant.startswith("openai"):
        architecture = VIT if variant == "openai_vit" else RESNET
        model, size = make_clip(architecture), architecture.image_size
        tokens = torch.randint(1, 49000, (4, 9))
    else:
        size = 64 if variant == "bert_vit" else 32
        encoder = "test_vit" if variant == "bert_vit" else "test_resnet"
        unlocked = {"bert_locked": {"text_unlocked_stages": 1}, "bert_lora": {"lora_rank": 2}}
        bundle = MODELS.build(
            bert_config(bert, image_encoder=encoder, image_size=size, **unlocked.get(variant, {}))
        )
        model = bundle.model
        tokens = bundle.tokenizer(["a dog", "the cat on the beach !", "a", "cats"])
    images = torch.randint(0, 256, (4, 3, size, size), dtype=torch.uint8)
    return set_dropout(model.double(), 0.0), images, tokens


def set_dropout(model: DualEncoder, share: float) -> DualEncoder:
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = share
    return model


def step(model: DualEncoder, images: Tensor, tokens: Tensor) -> dict[str, Tensor]:
    """Gradients and buffers by name after one step of the plain contrastive loss."""
    torch.manual_seed(7)
    model.train()
    model.zero_grad()
    output = model(images, tokens)
    logits = output.logit_scale * output.image_features @ output.text_features.T
    (-logits.log_softmax(-1).diagonal().mean()).backward()
    trained = {n: p.grad.clone() for n, p in model.named_parameters() if p.requires_grad}
    return trained | {name: buffer.clone() for name, buffer in model.named_buffers()}


def assert_close(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, reference in expected.items():
        if reference.is_floating_point():
            error = (found[name] - reference).nan_to_num().norm()
            assert error <= 1e-9 * reference.norm().nan_to_num(0, 0, 0) + 1e-13, name
        else:
            assert torch.equal(found[name], reference), name


def count_passes(model: DualEncoder) -> Callable[[], int]:
    """How often any module of the encoders was called since."""
    calls = []
    for module in model.modules():
        module.register_forward_pre_hook(lambda *_: calls.append(1))
    return lambda: len(calls)


@pytest.mark.parametrize("variant", ["openai_vit", "openai_resnet", "bert_resnet", "bert_locked"])
def test_a_batch_in_parts_has_the_gradients_of_the_whole(variant: str, bert: Path) -> None:
    model, images, tokens = make(variant, bert)
    apply_batch_norm_policy(model, BatchNorm.frozen, 1)
    expected = step(model, images, tokens)
    encode_in_parts(model, rows=3)
    sizes: list[int] = []
    model.image_tower.trunk.get_submodule("1").register_forward_pre_hook(
        lambda _, inputs: sizes.append(len(inputs[0]))
    )
    assert_close(step(model, images, tokens), expected)
    assert sizes == [3, 1]


@pytest.mark.parametrize(("policy", "in_parts"), [("frozen", True), ("local", False)])
def test_only_pictures_that_are_normalised_alone_pass_in_parts(
    policy: str, in_parts: bool, bert: Path
) -> None:
    model, _, _ = make("bert_resnet", bert)
    Stepper(model, BatchNorm[policy], LOSSES.build(ClipLossConfig()), TrainConfig(), CPU)
    assert ("forward" in vars(model.image_tower.trunk)) is in_parts


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("variant", VARIANTS)
def test_checkpointing_leaves_gradients_and_running_statistics_as_they_are(variant, bert, dropout):
    model, images, tokens = make(variant, bert)
    model.train()
    set_dropout(model, dropout)
    reference = copy.deepcopy(model)
    enable_grad_checkpointing(model)
    passes, plain = count_passes(model), count_passes(reference)
    for _ in range(2):
        assert_close(step(model, images, tokens), step(reference, images, tokens))
    assert passes() > 1.3 * plain()
    assert model.state_dict().keys() == reference.state_dict().keys()


@pytest.mark.parametrize("variant", ["openai_resnet", "bert_resnet"])
def test_checkpointing_and_frozen_statistics_go_together(variant, bert):
    model, images, tokens = make(variant, bert)
    reference = copy.deepcopy(model)
    enable_grad_checkpointing(model)
    for each in (model, reference):
        apply_batch_norm_policy(each, BatchNorm.frozen, 1)
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    found = step(model, images, tokens)
    assert_close(found, step(reference, images, tokens))
    for name, buffer in before.items():
        assert torch.equal(found[name], buffer), name


def test_a_copy_of_a_checkpointed_encoder_computes_with_its_own_weights(bert):
    model, images, tokens = make("openai_resnet", bert)
    enable_grad_checkpointing(model)
    copied = copy.deepcopy(model)
    expected = step(copied, images, tokens)
    for parameter in model.parameters():
        parameter.data.zero_()
    assert_close(step(copied.train(), images, tokens), {**expected, **dict(copied.named_buffers())})


def test_statistics_would_count_twice_without_the_hook(bert, monkeypatch):
    monkeypatch.setattr("twotower.training.towers._count_once", lambda norm: None)
    model, images, tokens = make("bert_resnet", bert)
    reference = copy.deepcopy(model)
    enable_grad_checkpointing(model)
    with pytest.raises(AssertionError, match="running_mean"):
        assert_close(step(model, images, tokens), step(reference, images, tokens))


def test_an_encoder_that_cannot_gets_a_sentence(bert):
    with pytest.raises(ConfigError) as raised:
        enable_grad_checkpointing(tiny_bundle().model)
    assert str(raised.value) == (
        "train.grad_checkpointing: the image encoder has none; use false, and "
        "train.micro_batch_size where memory is short"
    )
    model = make("bert_resnet", bert)[0]

    def refuse(enable: bool) -> None:
        raise AssertionError("gradient checkpointing not supported")

    model.image_tower.trunk[1].set_grad_checkpointing = refuse
    with pytest.raises(ConfigError, match="the image encoder has none"):
        enable_grad_checkpointing(model)
    model = make("bert_resnet", bert)[0]
    model.text_tower.trunk.encoder.supports_gradient_checkpointing = False
    with pytest.raises(ConfigError, match="the text encoder has none"):
        enable_grad_checkpointing(model)


def test_locked_encoders_get_a_warning(caplog):
    with caplog.at_level(logging.WARNING):
        enable_grad_checkpointing(tiny_bundle(locked=True).model)
    assert caplog.messages == ["train.grad_checkpointing changes nothing: no encoder is trained"]


def test_what_is_compiled_is_compiled_in_place(bert, monkeypatch):
    compiled = []
    monkeypatch.setattr(nn.Module, "compile", lambda self: compiled.append(self))
    for variant in ("openai_vit", "bert_resnet"):
        model = make(variant, bert)[0]
        names = list(model.state_dict())
        compile_towers(model, CPU, "train.compile")
        text = model.text_tower.trunk
        assert compiled[-2:] == [model.image_tower.trunk[1], getattr(text, "encoder", text)]
        assert list(model.state_dict()) == names
    towers = tiny_bundle(locked=True).model
    heads = DualEncoder(towers.image_tower.head, towers.text_tower.head)
    compile_towers(heads, CPU, "train.compile")
    assert compiled[-2:] == [towers.image_tower.head, towers.text_tower.head]


def test_what_compiling_lacks_is_said(monkeypatch, tmp_path):
    model = tiny_bundle().model

    def sentence(device):
        with pytest.raises(ConfigError) as raised:
            compile_towers(model, torch.device(device), "train.compile")
        return str(raised.value)

    with monkeypatch.context() as patched:
        patched.setenv("PATH", str(tmp_path))
        patched.setattr("importlib.util.find_spec", lambda name: name)
        expected = (
            "train.compile needs a C++ compiler and Python's headers; install them "
            "(Debian: g++ and python3-dev), or use train.compile=false"
        )
        assert sentence("cpu") == sentence("cuda") == expected
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert sentence("cuda") == (
        "train.compile needs triton; install it (pip install triton), or use train.compile=false"
    )


@pytest.mark.slow
def test_compiled_encoders_give_the_same_gradients(bert, monkeypatch, tmp_path):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    clip = make_clip(replace(VIT, vision_layers=1, embed_dim=20))
    bundle = MODELS.build(bert_config(bert, text_unlocked_stages=1))
    model = DualEncoder(clip.image_tower, bundle.model.text_tower, clip.logit_scale)
    set_dropout(model.double(), 0.0)
    images = torch.randint(0, 256, (4, 3, 32, 32), dtype=torch.uint8)
    tokens = bundle.tokenizer(["a dog", "the cat on the beach !", "a", "cats"])
    reference = copy.deepcopy(model)
    compile_towers(model, CPU, "train.compile")
    assert_close(step(model, images, tokens), step(reference, images, tokens))
    assert model.state_dict().keys() == reference.state_dict().keys()
    model.eval()
    reference.eval()
    with torch.inference_mode():
        found, expected = model(images[:3], tokens[:3]), reference(images[:3], tokens[:3])
        for one, other in zip(found, expected, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-12)
