"""Which parameters decay, and which learns at which rate."""

from __future__ import annotations

import logging
import math
import sys
import types
from pathlib import Path

import pytest
import torch
from torch import nn

from tests.helpers import tiny_bundle
from tests.models.tiny import VIT, bert_config, make_clip, write_bert
from twotower.models.dual_encoder import MODELS, DualEncoder
from twotower.settings import ConfigError
from twotower.train_config import Optimizer, TrainConfig
from twotower.training import optim
from twotower.training.optim import (
    build_optimizer,
    check_optimizer,
    load_optimizer_tensors,
    optimizer_tensors,
    set_learning_rate,
)


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_bert(tmp_path_factory.mktemp("bert"))


def settings_of(model: DualEncoder, config: TrainConfig) -> dict[str, tuple[float, float]]:
    """Learning rate and decay of each parameter that is optimised, by name."""
    names = {id(p): name for name, p in model.named_parameters()}
    groups = build_optimizer(model, config).param_groups
    found = {
        names[id(p)]: (group["lr"], group["weight_decay"])
        for group in groups
        for p in group["params"]
    }
    assert len(found) == sum(len(group["params"]) for group in groups)
    return found


def test_norms_biases_and_the_temperature_do_not_decay():
    model = tiny_bundle().model
    decayed, kept = build_optimizer(model, TrainConfig(weight_decay=0.3)).param_groups
    names = {id(p): name for name, p in model.named_parameters()}
    assert decayed["weight_decay"] == 0.3 and kept["weight_decay"] == 0.0
    assert {names[id(p)] for p in kept["params"]} == {n for n in names.values() if "bias" in n} | {
        "logit_scale"
    }
    assert len(decayed["params"]) + len(kept["params"]) == len(names)


def test_what_an_encoder_exempts_does_not_decay():
    found = settings_of(make_clip(VIT), TrainConfig(weight_decay=0.3))
    exempt = {name for name, (_, decay) in found.items() if decay == 0}
    assert {name for name in exempt if "embedding" in name} == {
        "image_tower.trunk.1.class_embedding",
        "image_tower.trunk.1.positional_embedding",
        "text_tower.trunk.positional_embedding",
    }
    assert found["text_tower.trunk.token_embedding.weight"][1] == 0.3
    assert "image_tower.trunk.1.proj" not in exempt


def test_the_log_names_what_does_not_decay(caplog):
    with caplog.at_level(logging.DEBUG):
        build_optimizer(tiny_bundle().model, TrainConfig(weight_decay=0.3, image_lr_scale=0.1))
    line, everything, rates = caplog.messages
    assert line == (
        "weight decay 0.3 on 4 tensors; none on 4 (norms, biases, scalars, positions), such as "
        "logit_scale, image_tower.trunk.2.bias, image_tower.head.bias"
    )
    assert everything.endswith("image_tower.head.bias, text_tower.head.bias")
    assert rates == "learning rates: train.lr times 0.1 to 1"


def test_a_locked_trunk_is_not_in_the_optimiser():
    model = tiny_bundle(locked=True).model
    groups = build_optimizer(model, TrainConfig()).param_groups
    optimised = {id(p) for group in groups for p in group["params"]}
    heads = [*model.image_tower.head.parameters(), *model.text_tower.head.parameters()]
    assert optimised == {id(p) for p in [*heads, model.logit_scale]}


def test_each_encoder_has_its_own_rate_and_heads_have_the_schedules():
    config = TrainConfig(lr=0.5, image_lr_scale=0.1, text_lr_scale=0.0)
    expected = {"image_tower.trunk": 0.05, "text_tower.trunk": 0.0}
    for name, (lr, _) in settings_of(tiny_bundle().model, config).items():
        assert lr == expected.get(".".join(name.split(".")[:2]), 0.5), name


def test_cached_towers_are_heads_at_the_schedules_rate():
    model = tiny_bundle(locked=True).model
    heads = DualEncoder(model.image_tower.head, model.text_tower.head, model.logit_scale)
    config = TrainConfig(lr=0.5, image_lr_scale=0.1, text_lr_scale=0.1, layer_decay=0.5)
    assert {lr for lr, _ in settings_of(heads, config).values()} == {0.5}


def test_layers_learn_slower_the_further_they_are_from_the_top(bert):
    config = TrainConfig(lr=1.0, image_lr_scale=0.1, text_lr_scale=0.2, layer_decay=0.5)
    found = settings_of(MODELS.build(bert_config(bert, text_unlocked_stages=2)).model, config)
    depth = {"layer4": 0, "layer3": 1, "layer2": 2, "layer1": 3, "conv1": 4, "bn1": 4}
    layer = {"layer.2": 0, "layer.1": 1}
    for name, (lr, _) in found.items():
        parts = name.split(".")
        if name.startswith("image_tower.trunk."):
            assert lr == 0.1 * 0.5 ** depth[parts[3]], name
        elif name.startswith("text_tower.trunk."):
            assert lr == 0.2 * 0.5 ** layer[f"layer.{parts[5]}"], name
        else:
            assert lr == 1.0, name
    assert sum("text_tower.trunk" in name for name in found) == 2 * 16


def test_adapters_learn_at_the_rate_of_their_stage(bert):
    config = TrainConfig(lr=1.0, text_lr_scale=0.2, layer_decay=0.5, weight_decay=0.3)
    model = MODELS.build(
        bert_config(bert, image_encoder="test_vit", image_size=64, lora_rank=2)
    ).model
    found = settings_of(model, config)
    adapters = {name: values for name, values in found.items() if ".lora_" in name}
    assert len(adapters) == 2 * (6 * 4 + 3 * 6)
    for name, values in adapters.items():
        layer = int(name.split(".blocks." if "blocks" in name else ".layer.")[1].split(".")[0])
        top, scale = (6, 1.0) if name.startswith("image_tower") else (3, 0.2)
        assert values == (scale * 0.5 ** (top - 1 - layer), 0.3), name


def test_openais_projection_is_the_top_stage():
    config = TrainConfig(lr=1.0, layer_decay=0.5)
    found = {name: lr for name, (lr, _) in settings_of(make_clip(VIT), config).items()}
    assert found["image_tower.trunk.1.proj"] == found["text_tower.trunk.ln_final.bias"] == 1.0
    assert found["image_tower.trunk.1.transformer.resblocks.0.ln_1.bias"] == 0.25
    assert found["text_tower.trunk.token_embedding.weight"] == 0.125


def test_layer_decay_on_an_encoder_without_stages_gets_a_sentence():
    with pytest.raises(ConfigError) as raised:
        build_optimizer(tiny_bundle().model, TrainConfig(layer_decay=0.9))
    assert str(raised.value) == "train.layer_decay: the image encoder has no stages; use 1"


def test_the_schedule_moves_every_group_by_its_factor_and_a_step_uses_it():
    torch.manual_seed(0)
    model = tiny_bundle().model
    config = TrainConfig(lr=1.0, image_lr_scale=0.1, text_lr_scale=0.0, weight_decay=0.2)
    optimizer = build_optimizer(model, config)
    set_learning_rate(optimizer, 0.01)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    # The first step of Adam is lr / (1 + eps) in the gradient's direction, after lr * decay.
    factors = {"image_tower.trunk": 0.1, "text_tower.trunk": 0.0}
    for name, parameter in model.named_parameters():
        rate = 0.01 * factors.get(".".join(name.split(".")[:2]), 1.0)
        decay = 0.2 if parameter.ndim == 2 else 0.0
        expected = before[name] * (1 - rate * decay) - rate
        torch.testing.assert_close(parameter.detach(), expected, rtol=1e-5, atol=1e-7)


def test_the_order_of_the_groups_does_not_depend_on_the_run(bert):
    config = TrainConfig(image_lr_scale=0.1, layer_decay=0.7)
    orders = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        model = MODELS.build(bert_config(bert)).model
        names = {id(p): name for name, p in model.named_parameters()}
        groups = build_optimizer(model, config).param_groups
        orders.append([[names[id(p)] for p in group["params"]] for group in groups])
    assert orders[0] == orders[1]


class Fused(torch.optim.SGD):
    """Stands in for apex's: records its arguments, counts steps a group, keeps two moments."""

    def __init__(self, params, lr, **arguments):
        self.arguments = arguments
        super().__init__(params, lr=lr)

    def step(self):
        for group in self.param_groups:
            group["step"] = group.get("step", 0) + 1
            for parameter in group["params"]:
                state = self.state[parameter]
                state["exp_avg"] = state.get("exp_avg", 0) * 0.9 + parameter.grad
        super().step()


@pytest.fixture
def apex(monkeypatch):
    """A package with apex's optimisers, and a model that says that it is on a GPU."""
    module, optimizers = types.ModuleType("apex"), types.ModuleType("apex.optimizers")
    optimizers.FusedAdam = type("FusedAdam", (Fused,), {})
    optimizers.FusedLAMB = type("FusedLAMB", (Fused,), {})
    module.optimizers = optimizers
    monkeypatch.setitem(sys.modules, "apex", module)
    monkeypatch.setitem(sys.modules, "apex.optimizers", optimizers)
    monkeypatch.setattr(optim, "_device", lambda model: torch.device("cuda"))
    return optimizers


@pytest.mark.parametrize(
    ("kind", "extra"),
    [(Optimizer.fused_adam, {}), (Optimizer.fused_lamb, {"max_grad_norm": math.inf})],
)
def test_apexs_optimisers_get_the_same_groups_and_settings(apex, kind, extra):
    config = TrainConfig(optimizer=kind, lr=0.5, beta2=0.95, eps=1e-7, image_lr_scale=0.1)
    model = tiny_bundle().model
    made = build_optimizer(model, config)
    assert type(made).__name__ == {"fused_adam": "FusedAdam", "fused_lamb": "FusedLAMB"}[kind.name]
    assert made.arguments == {"betas": (0.9, 0.95), "eps": 1e-7, "adam_w_mode": True, **extra}
    for group, expected in zip(
        made.param_groups, optim.parameter_groups(model, config), strict=True
    ):
        assert all(a is b for a, b in zip(group["params"], expected["params"], strict=True))
        for key in ("lr", "lr_scale", "weight_decay"):
            assert group[key] == expected[key]


def test_apexs_optimisers_are_refused_where_they_cannot_run(apex, monkeypatch):
    lamb = TrainConfig(optimizer=Optimizer.fused_lamb)
    cuda, cpu = torch.device("cuda"), torch.device("cpu")
    check_optimizer(lamb, cuda)
    check_optimizer(TrainConfig(), cpu)

    def sentence(device):
        with pytest.raises(ConfigError) as raised:
            check_optimizer(lamb, device)
        return str(raised.value)

    assert sentence(cpu) == (
        "train.optimizer=fused_lamb needs a CUDA device; use train.optimizer=adamw"
    )
    missing = (
        "train.optimizer=fused_lamb needs NVIDIA's apex, which is not installed; build it from "
        "github.com/NVIDIA/apex (apex on PyPI is another package), or use train.optimizer=adamw"
    )
    del apex.FusedLAMB
    assert sentence(cuda) == missing
    monkeypatch.setitem(sys.modules, "apex", None)
    assert sentence(cuda) == missing
    with pytest.raises(ConfigError, match="needs NVIDIA's apex"):
        build_optimizer(tiny_bundle().model, lamb)


def test_apex_without_its_extensions_gets_a_sentence(apex):
    def refuse(*_, **__):
        raise RuntimeError("apex.optimizers.FusedAdam requires cuda extensions")

    apex.FusedAdam = refuse
    with pytest.raises(ConfigError, match="requires cuda extensions; build apex with its CUDA"):
        build_optimizer(tiny_bundle().model, TrainConfig(optimizer=Optimizer.fused_adam))


def steps(model, optimizer, numbers):
    for number in numbers:
        generator = torch.Generator().manual_seed(number)
        for parameter in model.parameters():
            parameter.grad = torch.randn(parameter.shape, generator=generator)
        optimizer.step()


@pytest.mark.parametrize("kind", list(Optimizer))
def test_a_resumed_optimiser_goes_on_bit_for_bit(apex, kind, monkeypatch):
    if kind is Optimizer.adamw:
        monkeypatch.undo()
    config = TrainConfig(optimizer=kind, image_lr_scale=0.1)
    whole, first, second = (tiny_bundle(seed).model for seed in (0, 0, 1))
    made = [build_optimizer(model, config) for model in (whole, first, second)]
    steps(whole, made[0], range(6))
    steps(first, made[1], range(3))
    second.load_state_dict(first.state_dict())
    tensors = {name: tensor.clone() for name, tensor in optimizer_tensors(made[1]).items()}
    load_optimizer_tensors(made[2], tensors)
    steps(second, made[2], range(3, 6))
    for name, tensor in whole.state_dict().items():
        assert torch.equal(tensor, second.state_dict()[name]), name
    found, expected = (optimizer_tensors(optimizer) for optimizer in (made[2], made[0]))
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert any(name.startswith("group") for name in found) == (kind is not Optimizer.adamw)


def test_restored_moments_have_the_layout_of_their_weights():
    """A fused step reads both in the order of memory."""
    torch.manual_seed(0)
    steps = [torch.randn(8, 6, 3, 3) for _ in range(3)]
    whole, resumed = [
        nn.Conv2d(6, 8, 3, bias=False).to(memory_format=torch.channels_last) for _ in range(2)
    ]
    resumed.load_state_dict(whole.state_dict())
    optimizers = [torch.optim.AdamW(m.parameters(), lr=0.1, fused=True) for m in (whole, resumed)]
    for number, gradient in enumerate(steps):
        for model, optimizer in zip((whole, resumed), optimizers, strict=True):
            model.weight.grad = torch.empty_like(model.weight).copy_(gradient)
            optimizer.step()
        if number == 1:
            kept = {k: v.contiguous().clone() for k, v in optimizer_tensors(optimizers[1]).items()}
            load_optimizer_tensors(optimizers[1], kept)
    assert torch.equal(whole.weight, resumed.weight)
