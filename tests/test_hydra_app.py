"""Composing, checking, naming: what Hydra lets through and what it must not."""

import errno
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from hydra.errors import ConfigCompositionException
from omegaconf import OmegaConf

from twotower.config import Config
from twotower.data import DATASETS
from twotower.hydra_app import compose, log_dir
from twotower.hydra_errors import refusal, sentence
from twotower.model_config import ModelConfig
from twotower.models import MODELS
from twotower.retrieval import INDEXES
from twotower.runs import logs_path
from twotower.settings import ConfigError, from_plain, to_plain

CONF = Path(__file__).parents[1] / "conf"
GROUPS = {"model": MODELS, "data": DATASETS, "index": INDEXES}
EXPERIMENTS = sorted(path.stem for path in (CONF / "experiment").glob("*.yaml"))
OPTIONS = [
    (group.name, path.stem)
    for group in CONF.iterdir()
    if group.is_dir() and group.name not in ("hydra", "experiment", "sweep", "__pycache__")
    for path in group.glob("*.yaml")
]


def refused(*overrides):
    with pytest.raises(ConfigError) as error:
        compose(list(overrides))
    text = str(error.value)
    assert "\n" not in text
    return text


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_every_experiment_composes_and_validates(experiment):
    config = compose([f"experiment={experiment}"])
    assert isinstance(config, Config)
    text = (CONF / "experiment" / f"{experiment}.yaml").read_text()
    assert f"experiment={experiment}" in text.splitlines()[1], "it opens with its command"


@pytest.mark.parametrize(("group", "option"), OPTIONS)
def test_every_option_composes(group, option):
    assert isinstance(compose([f"{group}={option}"]), Config)


@pytest.mark.parametrize("group", GROUPS)
def test_every_registered_choice_has_an_option_of_its_name(group):
    assert {name for name in GROUPS[group]} <= {o for g, o in OPTIONS if g == group}
    for name in GROUPS[group]:
        chosen = getattr(compose([f"{group}={name}"]), group)
        assert chosen.registered_name == name
        assert from_plain(type(chosen), to_plain(chosen)) == chosen


def test_a_mistyped_key_is_refused_with_the_right_one():
    expected = "no such config key: train.lrr; did you mean train.lr?"
    for prefix in ("", "+", "++"):
        assert refused(f"{prefix}train.lrr=1") == expected
    assert refused("+trian.lr=1").startswith("no such config key: trian")
    assert refused("+nonsense=1") == "no such config key: nonsense"


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("train.batch_size=many", "train.batch_size: value 'many' of type 'str' could not be"),
        ("train.lr=-1", "train.lr must be greater than 0, not -1.0"),
        ("train.beta2=1", "train.beta2 must be less than 1, not 1.0"),
        (
            "train.precision=fp8",
            "train.precision: invalid value 'fp8', expected one of [fp32, bf16",
        ),
        ("benchmark.queries=[1,0]", "benchmark.queries must be at least 1, not 0"),
        ("seed=-2", "seed must be at least 0, not -2"),
        ("seed=4294967296", "seed must be at most 4294967295, not 4294967296"),
        (
            "distributed.timeout_minutes=1e9",
            "distributed.timeout_minutes must be at most 1000000, not 1000000000.0",
        ),
        ("benchmark.queries=[]", "benchmark.queries is empty; give at least one, as in queries="),
        ("benchmark.indexes=[]", "benchmark.indexes is empty; give at least one, as in indexes="),
        ("run.name=", "run.name must be the name of one folder, without a slash, not ''; "),
        ("run.name=..", "run.name must be the name of one folder, without a slash, not '..'; "),
        ("run.name=a/b", "run.name must be the name of one folder, without a slash, not 'a/b'; "),
        (
            "model=bert_resnt",
            "could not find 'model/bert_resnt'; available options in 'model': bert",
        ),
        ("train.lr=what's this", 'cannot read "train.lr=what\'s this": an override is key=value'),
        ("lonely", "cannot read 'lonely': an override is key=value"),
    ],
)
def test_a_wrong_value_is_one_sentence(override, expected):
    assert expected in refused(override)


def test_a_run_is_named_after_what_decides_its_result():
    name = compose([]).run.name
    assert name.startswith("bert_resnet-openmoji-") and len(name.rsplit("-", 1)[1]) == 8
    for same in ("train.num_workers=3", "train.overwrite=true", "encode.batch_size=7"):
        assert compose([same]).run.name == name
    for other in ("seed=2", "train.lr=0.5", "model.embed_dim=64", "data=flickr8k"):
        assert compose([other]).run.name != name
    assert compose(["run.name=mine"]).run.name == "mine"


def run_cli(*arguments, folder):
    command = [sys.executable, "-m", "twotower", *arguments]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=120)


@pytest.mark.parametrize(
    "bad", ["train.lrr=1", "++train.lrr=1", "train.lr=-1", "distributed.nproc_per_node=1000"]
)
def test_the_command_line_says_it_in_one_sentence(tmp_path, bad):
    result = run_cli("train", bad, folder=tmp_path)
    assert result.returncode == 1
    assert result.stderr.startswith("twotower: ") and result.stderr.count("\n") == 1
    assert "Traceback" not in result.stderr + result.stdout
    assert os.listdir(tmp_path / "logs" if bad.startswith("dist") else tmp_path) == []


def test_what_is_refused_leaves_an_earlier_run_as_it_was(tmp_path):
    log_file = tmp_path / "logs" / "mine" / "train" / "train.log"
    log_file.parent.mkdir(parents=True)
    log_file.write_text("step 1\n")
    assert run_cli("train", "run.name=mine", "train.lr=-1", folder=tmp_path).returncode == 1
    assert os.listdir(log_file.parent) == ["train.log"], "nor is its .hydra replaced"
    assert run_cli("evaluate", "run.name=mine", folder=tmp_path).returncode == 1
    assert log_file.read_text() == "step 1\n"
    assert os.listdir(tmp_path / "logs" / "mine") == ["train"]


@pytest.mark.parametrize("sweep", ["learning_rate", "variants"])
def test_a_sweep_runs_its_jobs_under_names_of_their_own(tmp_path, sweep):
    """Each job is refused here, before it trains: what matters is that each has its folder."""
    where = ["data=folder", "data.folder=nothing", "experiment=quickstart_bert_resnet"]
    result = run_cli(
        "train", f"sweep={sweep}", *where[: 2 if sweep == "variants" else 3], folder=tmp_path
    )
    text = (CONF / "sweep" / f"{sweep}.yaml").read_text()
    values = re.search(r"^ +(train.lr|experiment): (.+)$", text, re.MULTILINE)[2].split(",")
    jobs = sorted((tmp_path / "logs").glob("*/train/train.log"))
    assert len(jobs) == len(values) > 2
    assert result.returncode == 1 and "Traceback" not in result.stderr + result.stdout
    for job in jobs:
        assert "nothing" in job.read_text()
    assert {"learning_rate", "variants", "optuna"} == {f.stem for f in (CONF / "sweep").glob("*")}


def test_a_sweep_under_torchrun_is_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "x")
    result = run_cli("train", "sweep=learning_rate", folder=tmp_path)
    assert result.returncode == 1
    assert result.stderr.startswith("twotower: a sweep cannot run under torchrun; ")


@pytest.mark.parametrize(
    ("option", "extra"),
    [
        ("hydra/sweeper=optuna", "optuna"),
        ("hydra/launcher=submitit_slurm", "slurm"),
        ("hydra/launcher=ray", "ray"),
    ],
)
def test_a_plugin_that_is_not_installed_is_named(option, extra):
    group, _, name = option.partition("=")
    lines = f"Could not find '{group}/{name}'\n\nAvailable options in '{group}':\n\tbasic\n"
    said = sentence(ConfigCompositionException(lines))
    assert said == f"{option} needs a plugin: pip install 'twotower[{extra}]'"


def test_the_seed_of_the_splits_is_bounded_as_the_other_seeds():
    assert refused("data=flickr8k", "data.split_seed=4294967296") == (
        "data.split_seed must be at most 4294967295, not 4294967296"
    )


def test_what_a_newer_version_wrote_is_refused_with_a_sentence():
    with pytest.raises(ConfigError) as error:
        from_plain(ModelConfig, {"batch_norm": "group"})
    assert str(error.value) == (
        "model.batch_norm=group is not known to this version of twotower, "
        "which knows frozen, sync, local"
    )


def caused(error, cause):
    error.__cause__ = cause
    return error


@pytest.mark.parametrize(
    ("error", "sentence"),
    [
        (PermissionError(errno.EACCES, "Permission denied", "logs/a"), "logs/a: Permission denied"),
        (OSError(errno.ENOSPC, "No space left on device", "x.json"), "x.json: No space left on"),
        (OSError(errno.ENOSPC, "No space left on device"), "cannot write: No space left on device"),
        (
            caused(ValueError("no handler"), IsADirectoryError(21, "Is a directory", "a.log")),
            "a.log",
        ),
        (OSError("libgomp.so.1: cannot open shared object file"), None),
        (ConnectionResetError(errno.ECONNRESET, "Connection reset by peer"), None),
        (KeyError("x"), None),
    ],
)
def test_a_place_that_cannot_be_used_is_told_from_a_fault_of_the_program(error, sentence):
    mistake = refusal(error)
    assert (mistake is None) == (sentence is None)
    if mistake is not None:
        assert sentence in str(mistake)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (
            ["train", "run.logs_dir=afile", "run.name=r"],
            "twotower: cannot write or read afile/r/train: Not a directory\n",
        ),
        (
            ["train", "-m", "run.logs_dir=afile"],
            "twotower: cannot write or read afile: File exists\n",
        ),
        (
            ["train", "run.name=../other"],
            "twotower: run.name must be the name of one folder, without a slash, "
            "not '../other'; run.models_dir and run.logs_dir say where it lies\n",
        ),
    ],
)
def test_folders_that_cannot_be_made_get_one_sentence(tmp_path, arguments, sentence):
    (tmp_path / "afile").touch()
    result = run_cli(*arguments, folder=tmp_path)
    assert (result.returncode, result.stderr) == (1, sentence)
    assert os.listdir(tmp_path) == ["afile"]


@pytest.mark.parametrize(
    "arguments",
    [
        ["prepare", "data=manifest"],
        ["compare"],
        ["export", "path=a.pt", "checkpoint=models/r/best.safetensors"],
    ],
)
def test_commands_without_a_run_leave_no_folder(tmp_path, arguments):
    result = run_cli(*arguments, folder=tmp_path)
    assert (result.returncode, result.stderr.count("\n")) == (1, 1)
    assert os.listdir(tmp_path) == []


def test_a_command_logs_beside_the_run_whose_checkpoint_it_is_given(tmp_path):
    log_file = tmp_path / "logs" / "r" / "evaluate" / "evaluate.log"
    log_file.parent.mkdir(parents=True)
    log_file.write_text("earlier\n")
    assert run_cli("evaluate", "checkpoint=models/r/best.safetensors", folder=tmp_path).returncode
    assert os.listdir(tmp_path / "logs") == ["r"]
    assert sorted(os.listdir(log_file.parent)) == [".hydra", "evaluate.log"]


@pytest.mark.parametrize(
    ("command", "overrides", "expected"),
    [
        ("train", ["checkpoint=models/r/best.safetensors"], "mine/train"),
        ("encode", ["checkpoint=models/r/best.safetensors"], "r/encode"),
        ("search", ["store=models/r/store"], "r/search"),
        ("benchmark", ["store=models/r/store/"], "r/benchmark"),
        ("benchmark", [], "mine/benchmark"),
        ("evaluate", ["checkpoint=/best.safetensors"], "mine/evaluate"),
    ],
)
def test_where_a_command_logs_is_where_it_writes(command, overrides, expected):
    config = compose(["run.name=mine", *overrides])
    assert log_dir(OmegaConf.structured(config), command) == expected
    if command != "train":
        assert logs_path(config) / command == Path("logs", expected)
