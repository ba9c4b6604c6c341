"""What `metrics.jsonl` and the events hold after a run, a resumed run, and on other ranks."""

from __future__ import annotations

import io
import json
import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from twotower.tracking import MetricWriter


def records(folder: Path) -> list[tuple[int, float]]:
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [(line["step"], line["train/loss"]) for line in map(json.loads, lines)]


def curve(folder: Path) -> list[tuple[int, float]]:
    events = EventAccumulator(str(folder)).Reload()
    return [(event.step, event.value) for event in events.Scalars("train/loss")]


def write(folder: Path, steps: range, value: float, done: int = 0) -> None:
    with MetricWriter(folder, done) as writer:
        for step in steps:
            writer.write(step, {"train/loss": value})


def test_a_resumed_run_replaces_what_was_after_its_checkpoint(tmp_path: Path) -> None:
    folder = tmp_path / "a" / "logs"
    write(folder, range(1, 6), 1.0)
    write(folder, range(4, 6), 2.0, done=3)
    assert records(folder) == [(1, 1.0), (2, 1.0), (3, 1.0), (4, 2.0), (5, 2.0)]
    assert curve(folder) == records(folder)


def test_a_validation_that_is_measured_again_is_recorded_once(tmp_path: Path) -> None:
    for validated, kept in ((True, ["train/loss", "val/R"]), (False, ["train/loss"])):
        with MetricWriter(tmp_path) as writer:
            writer.write(3, {"train/loss": 0.5})
            writer.write(3, {"val/R": 1.0})
        MetricWriter(tmp_path, 3, validated=validated).close()
        lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
        assert [list(json.loads(line))[-1] for line in lines] == kept


def test_a_line_that_a_kill_cut_is_dropped(tmp_path: Path) -> None:
    write(tmp_path, range(1, 4), 1.0)
    path = tmp_path / "metrics.jsonl"
    path.write_text(path.read_text()[:-20])
    write(tmp_path, range(3, 4), 2.0, done=2)
    assert records(tmp_path) == [(1, 1.0), (2, 1.0), (3, 2.0)]


def test_a_run_from_the_start_keeps_no_older_record(tmp_path: Path) -> None:
    write(tmp_path, range(1, 4), 1.0)
    write(tmp_path, range(1, 3), 2.0)
    assert records(tmp_path) == [(1, 2.0), (2, 2.0)]


def test_a_record_is_on_disk_at_once(tmp_path: Path) -> None:
    with MetricWriter(tmp_path) as writer:
        writer.write(1, {"train/loss": 0.5, "val/R": 3.0})
        [line] = (tmp_path / "metrics.jsonl").read_text().splitlines()
    record = json.loads(line)
    assert list(record) == ["step", "time", "train/loss", "val/R"]
    assert (record["train/loss"], record["val/R"]) == (0.5, 3.0)


def test_other_ranks_write_nothing(tmp_path: Path) -> None:
    with MetricWriter(tmp_path / "logs", main=False) as writer:
        writer.write(1, {"train/loss": 1.0})
        writer.image("figures/matrix", np.zeros((2, 2, 3), np.uint8), 1)
    assert os.listdir(tmp_path) == []


def test_a_folder_that_is_a_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "logs").touch()
    with pytest.raises(OSError) as error:
        MetricWriter(tmp_path / "logs")
    assert error.value.filename == str(tmp_path / "logs")


def test_a_figure_is_in_the_events_as_it_was_drawn(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 255, (20, 30, 3), dtype=np.uint8)
    with MetricWriter(tmp_path) as writer:
        writer.image("figures/matrix", pixels, 7)
        assert not writer.takes_tables
        writer.table("figures/table", ["caption"], [["a dog"]], 7)
    [event] = EventAccumulator(str(tmp_path)).Reload().Images("figures/matrix")
    assert event.step == 7
    assert np.array_equal(np.array(Image.open(io.BytesIO(event.encoded_image_string))), pixels)
