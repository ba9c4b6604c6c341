"""What ends a run early, and what is measured and kept beside it."""

import json

import pytest
import torch

from tests.helpers import write_pictures
from twotower.checkpoint.native import load_checkpoint, read_header
from twotower.hydra_app import compose
from twotower.runs import RunPaths
from twotower.settings import ConfigError
from twotower.training.resume import Progress
from twotower.training.run import train
from twotower.training.validation import Validator

TINY = [
    "model=openai_pretrain",
    "model.image_size=32",
    "data=synthetic",
    "train=smoke",
    "train.epochs=12",
    "evaluate.bootstrap=0",
    "zeroshot.templates=simple7",
    "train.figures=false",
    "run.name=mine",
]


@pytest.fixture
def ask(tmp_path):
    def ask(*more):
        where = [f"run.models_dir={tmp_path}/models", f"run.logs_dir={tmp_path}/logs"]
        return compose([*TINY, *where, f"data.folder={tmp_path}/synthetic", *more])

    return ask


def records(config):
    lines = (RunPaths.of(config).logs / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def validations(config):
    return [record for record in records(config) if "val/mean_recall" in record]


def test_progress_counts_validations_without_a_change_that_counts():
    state = Progress()
    seen = [state.observe(value, 1.0) for value in (10.0, 10.5, 10.9, 11.2, 11.0)]
    assert seen == [True, True, True, True, False]
    assert (state.best, state.compared, state.stale) == (11.2, 11.2, 1)


def test_early_stopping_ends_after_patience_and_the_run_is_finished(ask, caplog):
    config = ask("train.early_stopping=true", "train.patience=2", "train.min_change=200")
    train(config)
    assert len(validations(config)) == 3
    assert "val/mean_recall has not improved in 2 validations" in caplog.text
    last = RunPaths.of(config).last
    header = read_header(last)
    assert header["finished"] and header["training"]["ended"]
    before = last.read_bytes()
    train(config)
    assert last.read_bytes() == before


def test_the_watched_metric_decides_the_best_and_must_exist(ask):
    config = ask("train.watch=val/image_to_text_R@1", "train.epochs=2")
    train(config)
    best = read_header(RunPaths.of(config).best)
    values = {r["step"]: r["val/image_to_text_R@1"] for r in validations(config)}
    assert values[best["step"]] == max(values.values())
    with pytest.raises(ConfigError, match="train.watch: val/recall is not measured; choose one of"):
        train(ask("train.watch=val/recall", "train.overwrite=true"))


FOLDER = ["data@probe.data=folder", "probe.data.captions=classes"]


def folder_of_classes(folder):
    for path, caption in write_pictures(folder / "all", 24):
        name = caption.split()[1]
        (folder / "classes" / "val" / name).mkdir(parents=True, exist_ok=True)
        path.rename(folder / "classes" / "val" / name / path.name)
    return folder / "classes"


def test_a_probe_is_measured_and_the_ends_of_wise_ft_are_those_validations(ask, tmp_path, caplog):
    caplog.set_level("INFO")
    probe = [*FOLDER, f"probe.data.folder={folder_of_classes(tmp_path)}"]
    config = ask(*probe, "probe.metric=zeroshot_top1", "train.epochs=1", "train.wise_ft=true")
    train(config)
    found = validations(config)
    assert all("probe/zeroshot_top1" in r and "probe/text_to_image_R@1" in r for r in found)
    assert "probe: zeroshot_top1" in caplog.text and "+0.0 since the start" in caplog.text
    paths = RunPaths.of(config)
    points = json.loads((paths.logs / "wise_ft.json").read_text())["points"]
    for point, record in ((points[0], found[0]), (points[-1], found[-1])):
        for name in ("val/mean_recall", "probe/zeroshot_top1"):
            assert point[name] == record[name]
    first, wise = (load_checkpoint(path)[1] for path in (paths.first, paths.wise_ft))
    assert first.keys() == wise.keys()
    with pytest.raises(ConfigError, match=r"probe.metric: probe/top9 is not measured"):
        train(ask(*probe, "probe.metric=top9", "train.overwrite=true"))


def test_forgetting_ends_the_run_at_the_first_validation_below(ask, tmp_path, monkeypatch, caplog):
    falls = iter([60.0, 58.0, 54.9, 50.0])
    measure = Validator.metrics

    def metrics(validator):
        values, measured = measure(validator)
        return {**values, "probe/mean_recall": next(falls)}, measured

    monkeypatch.setattr(Validator, "metrics", metrics)
    config = ask(
        "data@probe.data=synthetic",
        f"probe.data.folder={tmp_path}/synthetic",
        "train.stop_on_forgetting=5",
    )
    train(config)
    assert [r["probe/mean_recall"] for r in validations(config)] == [60.0, 58.0, 54.9]
    assert "is worse by 5.1 points, more than train.stop_on_forgetting=5" in caplog.text


def test_forgetting_needs_a_probe(ask):
    with pytest.raises(ConfigError, match="stop_on_forgetting needs a probe"):
        train(ask("train.stop_on_forgetting=5"))


def test_a_run_starts_from_a_checkpoint(ask):
    config = ask("train.epochs=1")
    train(config)
    best = RunPaths.of(config).best
    more = ask(f"train.start_from={best}", "run.name=more", "train.epochs=1", "train.wise_ft=true")
    train(more)
    begun, given = load_checkpoint(RunPaths.of(more).first)[1], load_checkpoint(best)[1]
    assert all(torch.equal(begun[name], given[name]) for name in begun)


def test_the_last_k_checkpoints_are_kept(ask):
    config = ask("train.epochs=2", "train.save_steps=4", "train.keep_last=3")
    train(config)
    paths = RunPaths.of(config)
    kept = sorted(paths.models.glob("step-*.safetensors"))
    steps = [read_header(path)["step"] for path in kept]
    assert len(kept) == 2 and [int(path.stem[5:]) for path in kept] == steps
    assert steps[-1] < read_header(paths.last)["step"]


def test_weights_that_have_forgotten_are_not_the_best(ask, monkeypatch):
    measure, falls = Validator.metrics, iter([60.0, 40.0])

    def metrics(validator):
        values, measured = measure(validator)
        return {**values, "val/mean_recall": 90.0, "probe/mean_recall": next(falls)}, measured

    monkeypatch.setattr(Validator, "metrics", metrics)
    config = ask("data@probe.data=synthetic", "train.stop_on_forgetting=5")
    train(config)
    assert read_header(RunPaths.of(config).best)["step"] == 0


def test_a_probe_needs_no_captions(ask, tmp_path):
    pictures = folder_of_classes(tmp_path)
    rows = [f"{p.relative_to(pictures)},val,{p.parent.name}" for p in pictures.rglob("*.jpg")]
    (pictures / "list.csv").write_text("\n".join(["filepath,split,kind", *rows]))
    config = ask(
        *("data@probe.data=manifest", f"probe.data.manifest={pictures}/list.csv"),
        *("probe.data.class_column=kind", "probe.data.caption_column="),
        *("probe.metric=zeroshot_top1", "train.epochs=1"),
    )
    train(config)
    assert all("probe/zeroshot_top1" in record for record in validations(config))


def test_a_sweep_that_was_killed_is_made_up_for(ask):
    config = ask("train.epochs=1", "train.wise_ft=true")
    train(config)
    paths = RunPaths.of(config)
    written = (paths.logs / "wise_ft.json").read_text()
    for path in (paths.wise_ft, paths.logs / "wise_ft.json"):
        path.unlink()
    train(config)
    assert paths.wise_ft.is_file()
    assert (paths.logs / "wise_ft.json").read_text() == written


@pytest.mark.parametrize(
    ("more", "sentence"),
    [
        (["train.eval_every=0", "train.early_stopping=true"], "early_stopping needs validations"),
        (["train.watch=train/loss"], "train.watch must name a metric of a validation"),
        (["train.start_from=no.safetensors"], "there is no checkpoint at no.safetensors"),
        (["train.pairing=separate", "train.batch_size=64"], "there are 48 training images"),
        (["train.micro_batch_size=16"], "more than the 8 pairs"),
    ],
)
def test_what_cannot_be_trained_gets_a_sentence(ask, more, sentence):
    with pytest.raises(ConfigError, match=sentence):
        train(ask(*more))
