"""Composing, checking, naming: what Hydra lets through and what it must not."""

import subprocess
import sys
from pathlib import Path

import pytest

from twotower.config import Config, ConfigError, from_plain, to_plain
from twotower.data import DATASETS
from twotower.hydra_app import compose
from twotower.models import MODELS
from twotower.retrieval import INDEXES

CONF = Path(__file__).parents[1] / "conf"
GROUPS = {"model": MODELS, "data": DATASETS, "index": INDEXES}
EXPERIMENTS = sorted(path.stem for path in (CONF / "experiment").glob("*.yaml"))
OPTIONS = [
    (group.name, path.stem)
    for group in CONF.iterdir()
    if group.is_dir() and group.name not in ("hydra", "experiment", "__pycache__")
    for path in group.glob("*.yaml")
]


def refusal(*overrides):
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
        assert refusal(f"{prefix}train.lrr=1") == expected
    assert refusal("+trian.lr=1").startswith("no such config key: trian")
    assert refusal("+nonsense=1") == "no such config key: nonsense"


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
        (
            "model=bert_resnt",
            "could not find 'model/bert_resnt'; available options in 'model': bert",
        ),
        ("train.lr=what's this", 'cannot read "train.lr=what\'s this": an override is key=value'),
        ("lonely", "cannot read 'lonely': an override is key=value"),
    ],
)
def test_a_wrong_value_is_one_sentence(override, expected):
    assert expected in refusal(override)


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
