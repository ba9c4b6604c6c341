"""What `twotower info` finds out."""

from __future__ import annotations

import os
from importlib.metadata import version
from pathlib import Path

import faiss
import pytest
import torch

from twotower import __version__, machine
from twotower.machine import describe, faiss_conflict, runs, stores, table


@pytest.fixture
def models(tmp_path: Path) -> Path:
    """Two runs, one of them with a store, an unfinished store, a note, and two backbones."""
    files = [
        "a/best.safetensors",
        "a/last.safetensors",
        "a/store/manifest.json",
        "b c/last.safetensors",
        "d/store/img_emb/img_emb_0000.npy",
        "README.md",
        "pretrained/minilm/model.safetensors",
        "pretrained/lite0.safetensors",
        "pretrained/.partial",
    ]
    for file in files:
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / file).touch()
    return tmp_path


def test_runs_and_stores_are_what_is_finished(models: Path) -> None:
    assert runs(models) == ["a", "b c"]
    assert stores(models) == ["a"]
    assert runs(models / "none") == stores(models / "none") == []


def test_facts_are_those_of_this_process(models: Path) -> None:
    facts = dict(describe(models))
    assert facts["twotower"] == __version__
    for name in ("torchvision", "timm", "transformers"):
        assert facts[name] == version(name)
    assert facts["torch"].startswith(f"{torch.__version__}, CPU ")
    assert f"{torch.get_num_threads()} threads" in facts["torch"]
    assert facts["cores"].startswith(f"{len(os.sched_getaffinity(0))} usable of")
    assert facts["faiss"].startswith(faiss.__version__)
    assert facts["backbones"] == "lite0.safetensors, minilm"
    assert (facts["runs"], facts["stores"]) == ("2", "1")


def test_missing_folder_is_no_error(tmp_path: Path) -> None:
    facts = dict(describe(tmp_path / "not" / "there"))
    assert facts["backbones"] == "none; twotower prepare backbones lays them out"
    assert (facts["runs"], facts["stores"]) == ("0", "0")


def test_two_faiss_builds_are_warned_about() -> None:
    assert faiss_conflict({"faiss-cpu", "torch", "faiss-tools"}) == ""
    assert faiss_conflict({"faiss-gpu-cu12"}) == ""
    assert faiss_conflict({"faiss-gpu", "torch", "faiss-cpu"}) == (
        "faiss-cpu and faiss-gpu are both installed and overwrite each other; "
        "run: pip uninstall faiss-cpu faiss-gpu, then install one"
    )


def test_table_is_aligned() -> None:
    lines = table([("a", "1"), ("transformers", "2")]).splitlines()
    assert [line.index(fact) for line, fact in zip(lines, "12", strict=True)] == [16, 16]


def test_free_bytes_are_those_of_this_machine(tmp_path: Path) -> None:
    assert 0 < (machine.free_bytes() or 0) < 2**50
    file = tmp_path / "stat"
    file.write_text("active_file 12\ninactive_file 7\n")
    assert machine._number(file, "inactive_file") == 7
    assert machine._number(file, "other") == machine._number(tmp_path / "none", "") == 0
