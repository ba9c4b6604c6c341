"""A run as asked for: reused, refused, gone on with, begun anew; never lost by a mistake."""

import dataclasses
import json
import shutil

import pytest
import torch

from twotower.checkpoint.native import load_checkpoint, read_header
from twotower.hydra_app import compose
from twotower.runs import RunPaths
from twotower.settings import ConfigError
from twotower.training import run
from twotower.training.run import train

TINY = [
    "model=openai_pretrain",
    "model.image_size=32",
    "data=synthetic",
    "train=smoke",
    "train.max_steps=2",
    "evaluate.bootstrap=20",
    "run.name=mine",
]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    config = asked(folder)
    train(config)
    return config


def asked(folder, *more):
    where = [f"run.models_dir={folder}/models", f"run.logs_dir={folder}/logs"]
    return compose([*TINY, *where, f"data.folder={folder}/synthetic", *more])


def again(config, **train_settings):
    return dataclasses.replace(config, train=dataclasses.replace(config.train, **train_settings))


def contents(config):
    paths = RunPaths.of(config)
    return {p: p.read_bytes() for p in (paths.best, paths.last, paths.models / "run.json")}


def report(config):
    return RunPaths.of(config).logs / "evaluate" / "synthetic-val.json"


def test_a_run_leaves_checkpoints_and_a_report_of_the_best(trained):
    best = read_header(RunPaths.of(trained).best)
    written = json.loads(report(trained).read_text())
    assert written["metrics"] == pytest.approx(best["metrics"])
    assert written["variant"] == "openai_pretrain" and written["intervals"]


def test_a_finished_run_is_reused(trained, monkeypatch):
    before = contents(trained)
    monkeypatch.setattr(run, "build_trainer", lambda *_: pytest.fail("it trains again"))
    train(trained)
    train(again(trained, num_workers=3, log_every=2))  # neither decides the result
    assert contents(trained) == before


def test_other_weights_to_start_from_are_another_run(trained, tmp_path):
    start = tmp_path / "start.safetensors"
    shutil.copyfile(RunPaths.of(trained).best, start)
    config = asked(tmp_path, f"train.start_from={start}", "train.max_steps=1")
    train(config)
    assert run.decide(config) == "reuse"
    shutil.copyfile(RunPaths.of(config).last, start)
    with pytest.raises(ConfigError, match=r"another config \(the weights of train.start_from\)"):
        run.decide(config)
    start.unlink()
    assert run.decide(config) == "reuse"


def test_a_finished_run_without_its_report_gets_it(trained):
    whole = json.loads(report(trained).read_text())
    report(trained).unlink()
    before = contents(trained)
    train(trained)
    assert json.loads(report(trained).read_text()) == whole
    assert contents(trained) == before


def test_another_config_under_the_same_name_is_refused(trained):
    with pytest.raises(ConfigError, match=r"another config \(train.epochs, train.lr\)"):
        train(again(trained, lr=0.5, epochs=7))


def test_a_mistake_under_overwrite_loses_nothing(trained):
    before = contents(trained)
    with pytest.raises(ConfigError, match="training images; lower it"):
        train(again(trained, overwrite=True, batch_size=100_000))
    assert contents(trained) == before and report(trained).is_file()


def test_a_refused_start_leaves_the_name_free(tmp_path):
    with pytest.raises(ConfigError, match="training images; lower it"):
        train(asked(tmp_path, "train.batch_size=100000"))
    train(asked(tmp_path))
    assert read_header(RunPaths.of(asked(tmp_path)).last)["finished"]


def test_a_damaged_note_is_a_sentence(trained, tmp_path):
    paths = RunPaths.of(trained)
    other = dataclasses.replace(
        trained, run=dataclasses.replace(trained.run, models_dir=str(tmp_path))
    )
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "best.safetensors").write_bytes(paths.best.read_bytes())
    (tmp_path / "mine" / "run.json").write_text('{"model')
    with pytest.raises(ConfigError, match="run.json is missing or damaged"):
        train(other)


def test_beginning_anew_gives_the_same_weights(trained):
    paths = RunPaths.of(trained)
    first = load_checkpoint(paths.last)[1]
    train(again(trained, overwrite=True))
    second = load_checkpoint(paths.last)[1]
    assert all(torch.equal(first[name], second[name]) for name in first)
