"""What a run records of how it was made, and what it must not record."""

from __future__ import annotations

import enum
import json
import os
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest

from twotower.config import Config
from twotower.hydra_app import compose
from twotower.provenance import (
    PROVENANCE,
    attempts,
    environment,
    masked,
    packages,
    plain,
    record_attempt,
    revision,
)
from twotower.runs import RunPaths
from twotower.settings import from_plain
from twotower.training import run
from twotower.training.run import train

TINY = [
    "model=openai_pretrain",
    "model.image_size=32",
    "data=synthetic",
    "train=smoke",
    "train.max_steps=1",
    "evaluate.bootstrap=0",
    "run.name=mine",
]


@pytest.fixture
def config(tmp_path: Path) -> Config:
    where = [f"run.models_dir={tmp_path}/models", f"run.logs_dir={tmp_path}/logs"]
    return compose([*TINY, *where, f"data.folder={tmp_path}/synthetic"])


def git(folder: Path, *arguments: str) -> str:
    me = ["-c", "user.name=n", "-c", "user.email=e"]
    done = subprocess.run(["git", "-C", folder, *me, *arguments], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def decisions(path: Path) -> list[str]:
    return [attempt["decision"] for attempt in attempts(path)]


def test_a_resumed_run_appends_and_one_that_begins_anew_does_not(
    tmp_path: Path, config: Config
) -> None:
    path = tmp_path / "run" / PROVENANCE
    for decision, recorded in (
        ("start", ["start"]),
        ("resume", ["start", "resume"]),
        ("resume", ["start", "resume", "resume"]),
        ("start", ["start"]),
    ):
        record_attempt(path, config, decision)
        assert decisions(path) == recorded
    path.write_text('[{"decision"')
    record_attempt(path, config, "resume")
    assert decisions(path) == ["resume"]
    assert os.listdir(path.parent) == [PROVENANCE]


def test_what_trained_is_recorded_and_what_was_reused_is_not(
    config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["twotower", "train", "run.name=mine", "a=b c"])
    path = RunPaths.of(config).models / PROVENANCE
    train(config)
    train(config)
    (attempt,) = attempts(path)
    assert attempt["command"] == "twotower train run.name=mine 'a=b c'"
    assert attempt["folder"] == os.getcwd()
    assert attempt["machine"]["ranks"] == 1
    assert attempt["packages"]["torch"] == version("torch")
    monkeypatch.setattr(run, "decide", lambda config: "resume")
    train(config)
    assert decisions(path) == ["start", "resume"]


def test_the_config_is_recorded_as_it_was_asked_for(config: Config) -> None:
    recorded = json.loads(json.dumps(plain(config)))
    for name in ("model", "data", "index", "loss"):
        section = getattr(config, name)
        assert recorded[name].pop("registered_name") == section.registered_name
    for name, values in recorded.items():
        section = getattr(config, name)
        rebuilt = from_plain(type(section), values) if isinstance(values, dict) else values
        assert rebuilt == (section.name if isinstance(section, enum.Enum) else section)


def test_the_revision_is_that_of_the_work_tree(tmp_path: Path) -> None:
    assert revision(tmp_path) is None
    git(tmp_path, "init", "--quiet")
    assert revision(tmp_path) is None, "there is no commit yet"
    (tmp_path / "below").mkdir()
    tracked = tmp_path / "below" / "a.py"
    tracked.write_text("1")
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "--quiet", "--message", "one")
    clean = {"root": str(tmp_path), "revision": git(tmp_path, "rev-parse", "HEAD"), "dirty": False}
    (tmp_path / "picture.jpg").touch()
    assert revision(tmp_path) == revision(tracked.parent, "a.py") == clean
    assert revision(tmp_path, "picture.jpg") is None, "an installed package in somebody's tree"
    tracked.write_text("2")
    assert revision(tmp_path) == {**clean, "dirty": True}
    assert revision(tmp_path / "gone") is None


def test_without_git_there_is_no_revision(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    assert revision(Path.cwd()) is None


def test_the_environment_is_what_changes_the_computation(monkeypatch: pytest.MonkeyPatch) -> None:
    recorded = {
        "CUDA_VISIBLE_DEVICES": "0,1",
        "OMP_NUM_THREADS": "3",
        "RANK": "1",
        "LOCAL_WORLD_SIZE": "2",
        "MASTER_ADDR": "node0",
        "SLURM_JOB_ID": "7",
        "NCCL_DEBUG": "INFO",
        "PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True",
    }
    hidden = {
        "SLURM_JWT": "s",
        "HF_HUB_TOKEN": "s",
        "RAY_AUTH_TOKEN": "s",
        "TORCH_SECRET_X": "s",
        "AWS_SECRET_ACCESS_KEY": "s",
        "WANDB_API_KEY": "s",
        "HOME_PAGE": "s",
    }
    for name, value in {**recorded, **hidden}.items():
        monkeypatch.setenv(name, value)
    found = environment()
    assert {name: found.get(name) for name in recorded} == recorded
    assert not set(hidden) & set(found)


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("x=postgresql://me:pw@host:5432/db", "x=postgresql://me:***@host:5432/db"),
        ("https://h:8080/a.tar?X-Token=abc&b=1", "https://h:8080/a.tar?X-Token=***&b=1"),
        ("s3://b/k?KeyId=a&Signature=b%2B c", "s3://b/k?KeyId=***&Signature=*** c"),
        ("train model.tokenizer=a?b c=1", "train model.tokenizer=a?b c=1"),
        ("http://host:80/x@y", "http://host:80/x@y"),
    ],
)
def test_passwords_in_addresses_are_masked(text: str, shown: str) -> None:
    assert masked(text) == shown
    assert json.loads(masked(json.dumps({"a": text}))) == {"a": shown}


def test_every_package_has_its_version() -> None:
    found = packages()
    assert found["hydra-core"] == version("hydra-core")
    assert found["twotower"] == version("twotower")
