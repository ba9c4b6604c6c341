"""Sweeps by Hydra's plugins: each job has a folder, a log, a result and a record of its command."""

from __future__ import annotations

import json
import os
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from twotower.checkpoint.native import read_header
from twotower.provenance import attempts

pytestmark = pytest.mark.slow

SMOKE = [
    "model=openai_pretrain",
    "model.image_size=32",
    "data=synthetic",
    "train=smoke",
    "train.max_steps=1",
    "evaluate.bootstrap=0",
]

# A command that trains in no time: the seed is its metric, and seed 2 diverges.
STUB = """
import sys
from twotower.hydra_app import run_command
from twotower.settings import Diverged

def command(config, free):
    if config.seed == 2:
        raise Diverged("the loss is nan")
    return float(config.seed)

sys.exit(run_command("train", command, {}, sys.argv[1:]))
"""


def python(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Python in `folder`, which is its home as well: Ray keeps a file there."""
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=folder,
        env={**os.environ, "HOME": str(folder), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=500,
    )


def sweep(folder: Path, *arguments: str) -> dict[str, dict[str, float]]:
    """Train two jobs; their metrics by the command that each recorded."""
    done = python(folder, "-m", "twotower", "train", *SMOKE, *arguments)
    assert done.returncode == 0, done.stdout + done.stderr
    runs = sorted(path.name for path in (folder / "models").iterdir())
    assert len(runs) == 2
    found = {}
    for name in runs:
        logs, models = folder / "logs" / name, folder / "models" / name
        assert "finished " in (logs / "train" / "train.log").read_text()
        assert (logs / "train" / ".hydra" / "overrides.yaml").is_file()
        assert json.loads((logs / "evaluate" / "synthetic-val.json").read_text())["metrics"]
        (attempt,) = attempts(models / "provenance.json")
        found[attempt["command"]] = read_header(models / "best.safetensors")["metrics"]
    return found


def test_two_optuna_trials_maximise_the_watched_metric(tmp_path: Path) -> None:
    found = sweep(tmp_path, "sweep=optuna", "hydra.sweeper.n_trials=2")
    best = OmegaConf.load(tmp_path / "logs" / "optimization_results.yaml")
    values = {command: metrics["mean_recall"] for command, metrics in found.items()}
    assert best.best_value == pytest.approx(max(values.values()))
    (chosen,) = [
        command for command in values if f"train.lr={best.best_params['train.lr']}" in command
    ]
    assert values[chosen] == max(values.values())


@pytest.mark.parametrize("launcher", ["submitit_local", "ray"])
def test_two_jobs_on_a_launcher(tmp_path: Path, launcher: str) -> None:
    found = sweep(tmp_path, "-m", "seed=1,2", f"hydra/launcher={launcher}")
    for seed, command in zip("12", sorted(found), strict=True):
        assert command.startswith("twotower train ") and f"seed={seed}" in command.split()


def test_a_trial_that_diverges_does_not_end_the_study(tmp_path: Path) -> None:
    optuna = ["hydra/sweeper=optuna", "hydra/sweeper/sampler=grid", "hydra.sweeper.n_jobs=1"]
    choose = ["-m", "seed=choice(1,2,3)", "hydra.sweeper.direction=maximize"]
    done = python(tmp_path, "-c", STUB, *optuna, *choose)
    assert done.returncode == 0, done.stderr
    assert "twotower: the loss is nan" in done.stderr
    results = OmegaConf.load(tmp_path / "logs" / "optimization_results.yaml")
    assert (results.best_value, results.best_params.seed) == (3.0, 3)


def test_a_study_goes_on_where_it_was_stored(tmp_path: Path) -> None:
    (tmp_path / "logs").mkdir()
    stored = ["hydra.sweeper.storage=sqlite:///logs/study.db", "hydra.sweeper.study_name=rate"]
    for count in (1, 2):
        done = python(tmp_path, "-c", STUB, "sweep=optuna", "hydra.sweeper.n_trials=1", *stored)
        assert done.returncode == 0, done.stderr
        with sqlite3.connect(tmp_path / "logs" / "study.db") as study:
            assert study.execute("select count(*) from trials").fetchone() == (count,)
            chosen = study.execute("select distinct param_value from trial_params").fetchall()
    assert len(chosen) == 6, "the second trial differs from the first"
