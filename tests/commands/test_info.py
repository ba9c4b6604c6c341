"""`twotower info` prints the facts and leaves nothing behind."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from twotower.commands.info import run
from twotower.config import Config, DataConfig, FreeText, IndexConfig, RunConfig
from twotower.machine import describe, table
from twotower.model_config import ModelConfig
from twotower.retrieval.scan import tiers
from twotower.train_config import LossConfig


def test_prints_the_table_of_its_models_folder(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "a run").mkdir()
    (tmp_path / "a run" / "best.safetensors").touch()
    config = Config(
        loss=LossConfig(),
        model=ModelConfig(),
        data=DataConfig(),
        index=IndexConfig(),
        run=RunConfig(name="x", models_dir=str(tmp_path)),
    )
    run(config, FreeText())
    printed = capsys.readouterr().out.splitlines()
    expected = table(describe(tmp_path)).splitlines()
    # Memory and disk change between the two calls.
    assert len(printed) == len(expected) + 1
    assert f"exact search    {tiers.describe()}" in printed
    assert set(expected) - set(printed) <= {
        line for line in expected if line.startswith(("memory", "disk"))
    }
    assert "runs            1" in printed


def test_command_leaves_nothing_behind(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "twotower", "info"], cwd=tmp_path, capture_output=True, text=True
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("twotower        ")
    assert list(tmp_path.iterdir()) == []
