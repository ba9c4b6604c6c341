from __future__ import annotations

import dataclasses
import json
import logging
from pathlib import Path

import pytest

from tests.retrieval.benchmark.helpers import section
from twotower.commands import benchmark as command
from twotower.config import Config, FreeText
from twotower.retrieval.benchmark import compare, limits
from twotower.retrieval.benchmark.limits import Rates
from twotower.retrieval.benchmark.measurement import Measurement, Results
from twotower.retrieval.benchmark.report import json_lines
from twotower.settings import ConfigError

ABOUT = {"rows": 10, "processor": "a chip", "torch_threads": 2, "data": "x"}


def measurement(index: str, round_ms: list[float], **others: object) -> Measurement:
    values = {"setting": "", "queries": 1, "k": 10, "text_recall": 1.0, "image_recall": 0.9}
    p50 = sorted(round_ms)[len(round_ms) // 2]
    return Measurement(
        index=index,
        round_ms=round_ms,
        p50_ms=p50,
        p95_ms=p50,
        queries_per_second=1000 / p50,
        **{**values, **others},  # type: ignore[arg-type]
    )


def results(*rows: Measurement, **about: object) -> Results:
    return Results({**ABOUT, **about}, Rates(1e9, 2e9, None), rows, ["something"])


def written(found: Results, file: Path) -> Path:
    file.write_text("".join(json.dumps(line) + "\n" for line in json_lines(found)))
    return file


OLD = results(
    measurement("a", [10, 11, 12]),
    measurement("b", [10, 11, 12]),
    measurement("c", [10, 11, 12]),
    measurement("d", [10, 11]),
    measurement("e", [10, 10, 10]),
    measurement("f", [10, 11, 12]),
    measurement("gone", [10, 11, 12]),
    Measurement("g", "", 1, 10, note="could not be built"),
)
NEW = results(
    measurement("a", [20, 22, 24]),  # a planted slowdown
    measurement("b", [11, 12, 13]),  # within the noise
    measurement("c", [5, 5.5, 6]),
    measurement("d", [100, 110]),  # of too few rounds
    measurement("e", [10.2, 10.2, 10.2]),  # too small a change
    measurement("f", [10, 11, 12], text_recall=0.99),
    measurement("new", [1, 1, 1]),
    measurement("g", [1, 1, 1]),
)


def test_a_file_reads_back_as_it_was_written(tmp_path: Path) -> None:
    assert compare.read(written(OLD, tmp_path / "old.jsonl")) == Results(
        OLD.about, OLD.rates, list(OLD.rows), list(OLD.notes)
    )


def test_a_planted_slowdown_is_found_and_noise_is_not(tmp_path: Path) -> None:
    old = compare.read(written(OLD, tmp_path / "old.jsonl"))
    new = compare.read(written(NEW, tmp_path / "new.jsonl"))
    found = compare.changes(old, new)
    assert [(row.label, row.mark) for row in found] == [
        *(("a", "slower"), ("b", ""), ("c", "faster"), ("d", ""), ("e", ""), ("f", "recall"))
    ]
    assert (found[0].ratio, found[0].low, found[0].high) == (0.5, 10 / 24, 12 / 20)
    assert compare.summary(old, new, found) == (
        "of 6 rows 1 are slower and 1 faster by more than the noise of their rounds, 1 find less; "
        "3 have no counterpart"
    )


def test_only_marked_rows_below_the_limit_fail() -> None:
    found = compare.changes(OLD, NEW)
    compare.refuse_slower(found, [], 0)
    with pytest.raises(ConfigError, match="2 of 6 rows .* slowest is a at Q=1 k=10, 0.50"):
        compare.refuse_slower(found, [], 0.9)
    slower = [row for row in found if row.mark == "slower"]
    compare.refuse_slower(slower, [], 0.4)
    compare.refuse_slower([row for row in found if row.label == "d"], [], 0.9)


def test_rows_that_are_no_longer_measured_fail() -> None:
    gone = compare.lost(OLD, NEW)
    assert gone == ["gone at Q=1 k=10"]  # and what the old did not measure either is not missed
    assert compare.lost(OLD, OLD) == []
    unbuilt = results(Measurement("a", "", 1, 10, note="could not be built"), *NEW.rows[1:])
    assert compare.lost(OLD, unbuilt) == ["a at Q=1 k=10", *gone]
    compare.refuse_slower([], gone, 0)
    with pytest.raises(ConfigError, match="^1 rows of the earlier .* first is gone at Q=1 k=10;"):
        compare.refuse_slower([], gone, 0.9)
    with pytest.raises(ConfigError, match="^2 of 6 rows are below .*; and 1 rows of the earlier"):
        compare.refuse_slower(compare.changes(OLD, NEW), gone, 0.9)


def test_what_else_has_changed_is_warned_of(caplog: pytest.LogCaptureFixture) -> None:
    assert compare.differences(ABOUT, {**ABOUT, "store": "elsewhere"}) == []
    with caplog.at_level(logging.WARNING):
        compare.report(OLD, results(processor="another", torch_threads=4), [])
    texts = [record.getMessage() for record in caplog.records]
    assert [text.partition("change: ")[2] for text in texts] == [
        "processor: a chip then, another now",
        "torch_threads: 2 then, 4 now",
    ]


def test_the_table_has_the_machine_and_every_row(capsys: pytest.CaptureFixture[str]) -> None:
    compare.report(OLD, NEW, compare.changes(OLD, NEW))
    lines = capsys.readouterr().out.splitlines()
    assert any(line.split() == ["(machine:", "read)", "1.00"] for line in lines)
    assert any(
        line.split() == ["a", "1", "10", "0.50", "0.42", "-", "0.60", "slower"] for line in lines
    )


@pytest.mark.parametrize("text", ["no json", "[1]", '{"kind": "environment"}', '{"a": 1}', ""])
def test_what_is_no_benchmark_is_refused(text: str, tmp_path: Path) -> None:
    file = tmp_path / "old.jsonl"
    file.write_text(text)
    with pytest.raises(ConfigError, match="takes a benchmark.jsonl that this version wrote"):
        compare.read(file)


def test_a_run_beside_itself(
    config: Config,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(limits, "READ_BYTES", 1 << 14)
    monkeypatch.setattr(limits, "SHAPE", (64, 32, 16))
    missing = str(tmp_path / "missing.jsonl")
    shape = section(indexes=["exact"], queries=[1], rounds=3, output=str(tmp_path / "out"))
    with pytest.raises(ConfigError, match=r"cannot read .*missing.jsonl: No such file"):
        command.run(
            dataclasses.replace(config, benchmark=dataclasses.replace(shape, compare=missing)),
            FreeText(),
        )
    command.run(dataclasses.replace(config, benchmark=shape), FreeText())
    capsys.readouterr()
    # The same file is written anew, after it was read.
    again = dataclasses.replace(shape, compare=str(tmp_path / "out" / "benchmark.jsonl"))
    command.run(dataclasses.replace(config, benchmark=again), FreeText())
    assert "of 1 rows " in capsys.readouterr().out
    failing = dataclasses.replace(again, indexes=["SQ8"], fail_below=0.1)
    with pytest.raises(ConfigError, match="1 rows of the earlier benchmark were not measured"):
        command.run(dataclasses.replace(config, benchmark=failing), FreeText())
    with pytest.raises(ConfigError, match=r"cannot read .*missing.jsonl"):
        command.run(dataclasses.replace(config, benchmark=again), FreeText(compare=missing))
