"""Between two sets of weights: the ends bit for bit, the middle in the middle, and its files."""

import json

import pytest
import torch
from PIL import Image

from tests.helpers import tiny_bundle
from twotower.training.wise_ft import choose, interpolate, put, sweep, table, write_sweep


def two_ends():
    ends = [tiny_bundle(seed=seed).model.state_dict() for seed in (0, 1)]
    for number, end in enumerate(ends):
        end["counter"] = torch.tensor(number * 10)
    return ends


def test_the_ends_are_exact_and_the_middle_is_the_mean():
    first, last = two_ends()
    for alpha, end in ((0, first), (1, last), (0.0, first), (1.0, last)):
        assert all(
            torch.equal(tensor, end[name])
            for name, tensor in interpolate(first, last, alpha).items()
        )
    half = interpolate(first, last, 0.5)
    for name in first:
        if name != "counter":
            torch.testing.assert_close(half[name], (first[name] + last[name]) / 2)
    assert int(interpolate(first, last, 0.4)["counter"]) == 0
    assert int(half["counter"]) == 10


def test_a_sweep_measures_each_alpha_and_leaves_the_last_weights():
    model = tiny_bundle(seed=1).model
    last = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    first = {
        name: tensor.clone() for name, tensor in tiny_bundle(seed=0).model.state_dict().items()
    }
    seen = []

    def measure():
        seen.append({name: tensor.clone() for name, tensor in model.state_dict().items()})
        return {"val": float(len(seen))}

    points = sweep(model, first, last, measure, (0, 0.25, 1))
    assert [point["alpha"] for point in points] == [0, 0.25, 1]
    for alpha, weights in zip((0, 0.25, 1), seen, strict=True):
        expected = interpolate(first, last, alpha)
        assert all(torch.equal(weights[name], expected[name]) for name in expected)
    assert all(torch.equal(tensor, last[name]) for name, tensor in model.state_dict().items())


def test_put_reaches_whoever_shares_the_tensors():
    model = tiny_bundle(seed=1).model
    weight = model.image_tower.head.weight
    put(model, tiny_bundle(seed=0).model.state_dict())
    assert torch.equal(weight, tiny_bundle(seed=0).model.image_tower.head.weight)


POINTS = [
    {"alpha": 0.0, "val/mean_recall": 20.0, "probe/top1": 60.0},
    {"alpha": 0.5, "val/mean_recall": 38.0, "probe/top1": 55.0},
    {"alpha": 1.0, "val/mean_recall": 40.0, "probe/top1": 41.0},
]
NAMES = ["val/mean_recall", "probe/top1"]


def test_the_chosen_alpha_has_the_best_mean():
    assert choose(POINTS, NAMES) == 0.5
    assert choose(POINTS, NAMES[:1]) == 1.0
    assert choose([{**point, "val/mean_recall": 1.0} for point in POINTS], NAMES[:1]) == 1.0


def test_the_sweep_is_written_as_json_table_and_plot(tmp_path):
    write_sweep(tmp_path, POINTS, NAMES, 0.5)
    assert json.loads((tmp_path / "wise_ft.json").read_text()) == {"chosen": 0.5, "points": POINTS}
    assert "| **0.5** | 38.0 | 55.0 |" in (tmp_path / "wise_ft.md").read_text()
    assert table(POINTS, NAMES, 0.5).count("\n") == 5
    assert Image.open(tmp_path / "wise_ft.png").size[0] == pytest.approx(910)
