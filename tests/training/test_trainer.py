"""A resumed run equals the whole one; cached features equal the towers; curves are written."""

import json

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tests.helpers import run_ranks, tiny_bundle, write_pictures
from twotower.checkpoint.native import load_checkpoint, read_header
from twotower.config import EvaluateConfig, ProbeConfig
from twotower.data.pairs import Pair, PairTable
from twotower.distributed import Stopped
from twotower.runs import RunPaths
from twotower.train_config import TrainConfig
from twotower.training.inputs import Examined, prepare_inputs
from twotower.training.loss import LOSSES, ClipLossConfig
from twotower.training.trainer import Trainer

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pictures")
    made = write_pictures(folder, 40)
    (folder / made[3][0].name).write_bytes(b"not a picture")
    rows = [
        Pair(path.name, f"{caption} {word}", "train" if i < 30 else "val", path.name)
        for i, (path, caption) in enumerate(made)
        for word in ("here", "there")
    ]
    return PairTable.from_pairs(rows, folder, "colours")


def make_trainer(pairs, folder, *, locked=False, dropout=0.0, **settings):
    fast = {"batch_size": 8, "epochs": 4, "lr": 1e-2, "log_every": 1, "figures": False}
    config = TrainConfig(**fast | settings)
    paths = RunPaths(folder / "models" / "run", folder / "logs" / "run")
    for path in (paths.models, paths.logs):
        path.mkdir(parents=True, exist_ok=True)
    bundle = tiny_bundle(locked=locked, dropout=dropout)
    torch.manual_seed(5)
    train, val = pairs.split("train"), pairs.split("val")
    inputs = prepare_inputs(bundle, train, Examined(val), config, 5, CPU, folder / "features")
    loss = LOSSES.build(ClipLossConfig())
    return Trainer(bundle, inputs, loss, config, EvaluateConfig(), ProbeConfig(), 5, paths, CPU)


def stop_at(trainer, step):
    """Stop the run as SIGTERM would, after `step` steps."""
    plain = trainer.save_if_asked

    def save_if_asked(stop):
        if trainer.state.step == step:
            stop.signal = 15
        plain(stop)

    trainer.save_if_asked = save_if_asked


def weights(path):
    return {k: v for k, v in load_checkpoint(path)[1].items()}


def read_records(paths):
    lines = (paths.logs / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def assert_same(one, other):
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("step", [1, 3, 5, 6, 11])
def test_a_resumed_run_equals_the_uninterrupted_one_bit_for_bit(pairs, tmp_path, step):
    # With dropout, so that a random state that is not put back is seen.
    whole = make_trainer(pairs, tmp_path / "whole", dropout=0.3)
    whole.run()
    stopped = make_trainer(pairs, tmp_path / "stopped", dropout=0.3)
    stop_at(stopped, step)
    with pytest.raises(Stopped):
        stopped.run()
    assert read_header(stopped.paths.last)["step"] == step
    again = make_trainer(pairs, tmp_path / "stopped", dropout=0.3)
    torch.manual_seed(99)
    again.resume()
    again.run()
    assert_same(weights(again.paths.last), weights(whole.paths.last))
    assert read_header(again.paths.best)["step"] == read_header(whole.paths.best)["step"]
    losses = [
        [record.get("train/loss") for record in read_records(t.paths)] for t in (whole, again)
    ]
    assert losses[0] == losses[1]


def _train(pairs, folder, stop, dropout=0.3):
    trainer = make_trainer(pairs, folder, dropout=dropout)
    if trainer.paths.last.exists():
        trainer.resume()
    if stop:
        stop_at(trainer, stop)
    try:
        trainer.run()
    except Stopped:
        return "stopped"
    return "finished"


def test_two_ranks_resume_bit_for_bit(pairs, tmp_path):
    assert run_ranks(_train, 2, pairs, tmp_path / "whole", 0) == ["finished"] * 2
    assert run_ranks(_train, 2, pairs, tmp_path / "parts", 4) == ["stopped"] * 2
    assert run_ranks(_train, 2, pairs, tmp_path / "parts", 0) == ["finished"] * 2
    last = "models/run/last.safetensors"
    assert_same(weights(tmp_path / "parts" / last), weights(tmp_path / "whole" / last))


def test_two_ranks_train_to_the_weights_of_one(pairs, tmp_path):
    run_ranks(_train, 2, pairs, tmp_path / "two", 0, 0.0)
    make_trainer(pairs, tmp_path / "one").run()
    last = "models/run/last.safetensors"
    one, two = weights(tmp_path / "one" / last), weights(tmp_path / "two" / last)
    for name in one:
        if not name.startswith("training.rng"):
            torch.testing.assert_close(two[name], one[name], rtol=1e-3, atol=1e-5)


def test_heads_on_cached_features_train_as_the_locked_towers_do(pairs, tmp_path):
    # An unreadable picture is left out of a cache and replaced in a loader: take readable ones.
    readable = pairs.take(torch.tensor([i for i in range(40) if i != 3]).numpy())
    cached = make_trainer(readable, tmp_path / "cached", locked=True)
    towers = make_trainer(readable, tmp_path / "towers", locked=True, cache_features=False)
    assert cached.inputs.model.image_tower is cached.bundle.model.image_tower.head
    cached.run()
    towers.run()
    found, expected = weights(cached.paths.last), weights(towers.paths.last)
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-4, atol=1e-6)
    again = make_trainer(readable, tmp_path / "cached", locked=True)
    assert torch.equal(again.inputs.train.views[0], cached.inputs.train.views[0])
    assert len(list((tmp_path / "cached" / "features").iterdir())) == 3


def test_an_unreadable_picture_leaves_the_cache_and_not_the_run(pairs, tmp_path):
    trainer = make_trainer(pairs, tmp_path, locked=True)
    assert len(trainer.inputs.train) == 29
    trainer.run()


def test_curves_are_in_the_event_files_and_in_jsonl(pairs, tmp_path):
    trainer = make_trainer(pairs, tmp_path)
    trainer.run()
    events = EventAccumulator(str(trainer.paths.logs)).Reload()
    recorded = read_records(trainer.paths)
    for name in ("train/loss", "train/lr", "train/logit_scale", "val/text_to_image_R@10"):
        curve = [(e.step, pytest.approx(e.value, rel=1e-6)) for e in events.Scalars(name)]
        assert curve == [(r["step"], r[name]) for r in recorded if name in r]
        assert len(curve) >= 4
    assert [e.step for e in events.Scalars("val/mean_recall")] == [0, 3, 6, 9, 12]
