"""Which entries share a table, in which order, and what may be called the best."""

from __future__ import annotations

import json
import logging
import os
from pathlib import Path
from typing import Any

import pytest

from twotower.config import Config
from twotower.hydra_app import compose
from twotower.metrics import KS
from twotower.report.compare import (
    HEADINGS,
    Entry,
    best_checkpoints,
    compare,
    grouped,
    markdown_table,
    read_entries,
)
from twotower.settings import ConfigError


def write(folder: Path, run: str, recall: float, name: str = "val", **changes: Any) -> Path:
    """A report as `twotower evaluate` writes it, and a file for its checkpoint."""
    checkpoint = folder / "models" / run / "best.safetensors"
    checkpoint.parent.mkdir(parents=True, exist_ok=True)
    checkpoint.touch()
    ways = ("text_to_image", "image_to_text")
    report = {
        "checkpoint": str(checkpoint),
        "variant": "bert_resnet",
        "parameters": 1_250_000,
        "train_seconds": 12.4,
        "data": "manifest",
        "split": "val",
        "max_images": 0,
        "data_fingerprint": "aaaaaaaaaaaa",
        "images": 1000,
        "captions": 5000,
        "metrics": {"mean_recall": recall, **{f"{w}_R@{k}": recall + k for w in ways for k in KS}},
        "intervals": {"text_to_image_R@1": [recall - 1, recall + 3]},
    }
    path = folder / "logs" / run / "evaluate" / f"{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(report | changes))
    return path


def config(folder: Path, *overrides: str) -> Config:
    return compose([f"run.logs_dir={folder / 'logs'}", *overrides], "compare")


def test_the_best_is_first_and_figures_stand_under_their_headings(tmp_path: Path) -> None:
    for run, recall in (("a", 20.0), ("b", 40.0), ("c", 30.0)):
        write(tmp_path, run, recall)
    entries = read_entries(tmp_path / "logs")
    assert [entry.run for entry in entries] == ["b", "c", "a"]
    [(where, group)] = grouped(entries)
    assert where == "manifest/val: 1,000 images, 5,000 captions"
    row = dict(zip(HEADINGS, group[0].cells(), strict=True))
    assert row["run"] == "b" and row["parameters"] == "1.2 M" and row["seconds"] == "12"
    assert (row["t->i R@1"], row["i->t R@10"]) == ("41.0 [39, 43]", "50.0")
    lines = markdown_table(where, group).splitlines()
    assert lines[0] == f"### {where}"
    assert [line.split(" | ")[0] for line in lines[4:]] == ["| b", "| c", "| a"]
    assert {line.count("|") for line in lines[2:]} == {len(HEADINGS) + 1}


def test_two_data_sets_of_one_name_and_size_have_a_table_each(tmp_path: Path) -> None:
    write(tmp_path, "a", 20.0)
    write(tmp_path, "b", 40.0, data_fingerprint="bbbbbbbbbbbb")
    write(tmp_path, "c", 30.0)
    write(tmp_path, "c", 90.0, "val-10", max_images=10, images=10, captions=50)
    tables = {
        where: [e.run for e in group] for where, group in grouped(read_entries(tmp_path / "logs"))
    }
    assert tables == {
        "manifest/val: 10 images, 50 captions": ["c"],
        "manifest/val: 1,000 images, 5,000 captions (aaaaaaaaaaaa)": ["c", "a"],
        "manifest/val: 1,000 images, 5,000 captions (bbbbbbbbbbbb)": ["b"],
    }


def test_the_best_is_of_whole_splits_and_of_checkpoints_that_are_there(tmp_path: Path) -> None:
    for run, recall in (("a", 20.0), ("b", 40.0), ("gone", 60.0)):
        write(tmp_path, run, recall)
    write(tmp_path, "few", 99.0, "val-10", max_images=10)
    write(tmp_path, "train", 80.0, "train", split="train")
    (tmp_path / "models" / "gone" / "best.safetensors").unlink()
    entries = read_entries(tmp_path / "logs")
    assert len(entries) == 5
    assert best_checkpoints(entries) == {
        "manifest/val": str(tmp_path / "models" / "b" / "best.safetensors"),
        "manifest/train": str(tmp_path / "models" / "train" / "best.safetensors"),
    }


def test_the_best_of_other_data_under_the_name_does_not_count(tmp_path: Path) -> None:
    old = write(tmp_path, "old", 90.0, data_fingerprint="bbbbbbbbbbbb")
    os.utime(old, (1, 1))
    for run, recall in (("a", 20.0), ("b", 40.0)):
        write(tmp_path, run, recall)
    best = best_checkpoints(read_entries(tmp_path / "logs"))
    assert best == {"manifest/val": str(tmp_path / "models" / "b" / "best.safetensors")}


def test_a_damaged_report_is_named_and_left_out(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write(tmp_path, "a", 20.0)
    cut = write(tmp_path, "cut", 30.0)
    cut.write_text(cut.read_text()[:100])
    other = write(tmp_path, "other", 30.0, metrics={})
    (tmp_path / "logs" / "list" / "evaluate").mkdir(parents=True)
    (tmp_path / "logs" / "list" / "evaluate" / "x.json").write_text("[1]")
    with caplog.at_level(logging.WARNING):
        assert [entry.run for entry in read_entries(tmp_path / "logs")] == ["a"]
    messages = [record.getMessage() for record in caplog.records]
    assert len(messages) == 3
    assert f"{cut} is left out: it is no whole report (JSONDecodeError)" in messages
    assert f"{other} is left out: it is no whole report (KeyError)" in messages


def test_missing_measurements_get_a_sentence(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="^no measurement of any run in .*twotower evaluate"):
        read_entries(tmp_path / "logs")
    write(tmp_path, "a", 20.0)
    with pytest.raises(ConfigError, match="^no measurement of x, y in "):
        read_entries(tmp_path / "logs", ["y", "a", "x"])


def test_compare_writes_the_table_and_the_best(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for run, recall in (("a", 20.0), ("b", 40.0), ("c", 30.0)):
        write(tmp_path, run, recall)
    compare(config(tmp_path, "report.runs=[a,c]"))
    written = json.loads((tmp_path / "logs" / "comparison.json").read_text())
    assert written["best"] == {"manifest/val": str(tmp_path / "models" / "c" / "best.safetensors")}
    assert [report["metrics"]["mean_recall"] for report in written["runs"]] == [30.0, 20.0]
    [table] = grouped(read_entries(tmp_path / "logs", ["a", "c"]))
    assert (tmp_path / "logs" / "comparison.md").read_text() == markdown_table(*table)
    assert "31.0 [29, 33]" in capsys.readouterr().out


def test_a_report_of_an_older_version_still_has_its_place() -> None:
    metrics = {"mean_recall": 5.0}
    report = {"data": "x", "split": "val", "checkpoint": "", "metrics": metrics}
    entry = Entry("a", {**report, "images": 1, "captions": 1})
    assert entry.fingerprint == ""
    assert [where for where, _ in grouped([entry])] == ["x/val: 1 images, 1 captions"]


def test_a_place_that_cannot_be_written_gets_a_sentence(tmp_path: Path) -> None:
    write(tmp_path, "a", 20.0)
    (tmp_path / "logs" / "comparison.md").mkdir()
    with pytest.raises(ConfigError, match="^cannot write .*comparison.md: "):
        compare(config(tmp_path))
