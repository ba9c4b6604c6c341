"""A checkpoint measured from end to end: what is written where, and what it says."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow as pa
import pytest
import torch

from tests.helpers import tiny_bundle, write_pictures
from twotower.config import Config
from twotower.data.pairs import Pair, PairTable, load_pairs
from twotower.evaluation import report as module
from twotower.evaluation.features import PictureInputs
from twotower.evaluation.prompts import Prompts
from twotower.evaluation.report import data_fingerprint, describe, evaluate
from twotower.evaluation.retrieval import measure_pairs
from twotower.evaluation.zeroshot import measure_zeroshot
from twotower.hydra_app import compose
from twotower.models.saved import save_bundle
from twotower.report.compare import read_entries
from twotower.settings import ConfigError


def table(folder: Path, *captions: str) -> PairTable:
    pairs = [Pair(f"{i}.jpg", caption, "val", str(i)) for i, caption in enumerate(captions)]
    return PairTable.from_pairs(pairs, folder, "data")


@pytest.fixture
def manifest(tmp_path: Path) -> Path:
    """Twelve pictures, two of them for training, one without a caption."""
    lines = ["filepath,caption,split"]
    for index, (path, caption) in enumerate(write_pictures(tmp_path / "pictures", 12)):
        split = "train" if index < 2 else "val"
        lines.append(f"{path},{'' if index == 5 else caption},{split}")
    path = tmp_path / "pairs.csv"
    path.write_text("\n".join(lines) + "\n")
    return path


@pytest.fixture
def checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The checkpoint of a run `r`, which loads as the tiny bundle."""
    path = tmp_path / "models" / "r" / "best.safetensors"
    save_bundle(path, tiny_bundle(), seconds=3.5)
    monkeypatch.setattr(module, "load_bundle", lambda path: tiny_bundle())
    return path


def config(folder: Path, manifest: Path, *overrides: str) -> Config:
    places = [f"run.logs_dir={folder / 'logs'}", f"run.models_dir={folder / 'models'}"]
    data = ["data=manifest", f"data.manifest={manifest}", "distributed.device=cpu"]
    return compose([*places, *data, "evaluate.bootstrap=20", *overrides], "evaluate")


def test_evaluate_writes_what_it_measured_and_on_what(
    tmp_path: Path, manifest: Path, checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    chosen = config(tmp_path, manifest, f"checkpoint={checkpoint}")
    evaluate(chosen)
    written = json.loads((tmp_path / "logs/r/evaluate/manifest-val.json").read_text())
    bundle, pairs = tiny_bundle(), load_pairs(chosen.data).split("val").with_captions()
    inputs = PictureInputs(pairs, bundle.eval_transform)
    cpu = torch.device("cpu")
    expected, _ = measure_pairs(
        bundle.model, pairs, inputs, bundle.tokenizer, chosen.evaluate, cpu, bootstrap=20
    )
    assert {key: written[key] for key in expected.to_json()} == json.loads(
        json.dumps(expected.to_json())
    )
    assert (written["images"], written["captions"]) == (9, 9)
    assert written["checkpoint"] == str(checkpoint)
    assert (written["data"], written["split"], written["max_images"]) == ("manifest", "val", 0)
    assert written["train_seconds"] == 3.5
    assert written["parameters"] == sum(p.numel() for p in bundle.model.parameters())
    assert written["data_fingerprint"] == data_fingerprint(pairs)
    out = capsys.readouterr().out
    assert out.startswith(f"{checkpoint} on manifest/val: 9 images, 9 captions; ")
    recall = written["metrics"]["text_to_image_R@1"]
    low, high = written["intervals"]["text_to_image_R@1"]
    assert f"{recall:.1f} [{low:.1f}, {high:.1f}]" in out


def test_a_part_of_a_split_has_a_file_and_a_fingerprint_of_its_own(
    tmp_path: Path, manifest: Path, checkpoint: Path
) -> None:
    for first in ("0", "4"):
        evaluate(config(tmp_path, manifest, "run.name=r", f"evaluate.max_images={first}"))
    evaluate(config(tmp_path, manifest, "run.name=r", "evaluate.split="))
    folder = tmp_path / "logs" / "r" / "evaluate"
    written = {path.name: json.loads(path.read_text()) for path in folder.iterdir()}
    assert {name: report["images"] for name, report in written.items()} == {
        "manifest-val.json": 9,
        "manifest-val-4.json": 4,
        "manifest-all.json": 11,
    }
    assert written["manifest-val-4.json"]["max_images"] == 4
    assert len({report["data_fingerprint"] for report in written.values()}) == 3


def test_the_seconds_are_of_the_whole_training(
    tmp_path: Path, manifest: Path, checkpoint: Path
) -> None:
    save_bundle(checkpoint.with_name("last.safetensors"), tiny_bundle(), seconds=8.0)
    measured = module.evaluate_checkpoint(config(tmp_path, manifest), checkpoint)
    assert measured.about["train_seconds"] == 8.0
    assert measured.zeroshot is None


def test_the_fingerprint_is_of_paths_and_captions_and_not_of_the_place(
    tmp_path: Path, manifest: Path
) -> None:
    pairs = table(tmp_path, "a dog", "a cat")
    assert data_fingerprint(pairs) == data_fingerprint(table(tmp_path / "moved", "a dog", "a cat"))
    others = [table(tmp_path, "a dog", "a cat!"), table(tmp_path, "a dog"), pairs.head(1)]
    renamed = pairs.table.set_column(0, "filepath", pa.array(["0.jpg", "2.jpg"], pa.large_string()))
    others.append(PairTable(renamed, tmp_path))
    assert data_fingerprint(others[1]) == data_fingerprint(others[2])
    assert data_fingerprint(pairs) not in {data_fingerprint(other) for other in others}
    about = describe(tiny_bundle(), Path("x"), config(tmp_path, manifest), 0.0, pairs)
    assert about["data_fingerprint"] == data_fingerprint(pairs)


def test_a_place_that_cannot_be_written_gets_a_sentence(
    tmp_path: Path, manifest: Path, checkpoint: Path
) -> None:
    (tmp_path / "logs").touch()
    with pytest.raises(ConfigError, match="^cannot write .*manifest-val.json: Not a directory$"):
        evaluate(config(tmp_path, manifest, "run.name=r"))


@pytest.fixture
def labelled(tmp_path: Path) -> Path:
    """Twelve pictures of three colours, all for validation but those of the third."""
    lines = ["filepath,caption,split,label"]
    for path, caption in write_pictures(tmp_path / "pictures", 12):
        colour = path.stem.split("_")[1]
        split = "train" if colour == "blue" else "val"
        lines.append(f"{path},{caption},{split},{'' if colour == 'white' else colour}")
    path = tmp_path / "labelled.csv"
    path.write_text("\n".join(lines) + "\n")
    return path


def test_pictures_with_classes_are_classified_too(
    tmp_path: Path, labelled: Path, checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    templates = tmp_path / "templates.txt"
    templates.write_text("a {} square\n{}\n")
    chosen = config(
        tmp_path,
        labelled,
        f"checkpoint={checkpoint}",
        "data.class_column=label",
        f"zeroshot.templates={templates}",
        "zeroshot.top_k=[1,2,5]",
    )
    evaluate(chosen)
    written = json.loads((tmp_path / "logs/r/evaluate/manifest-val.json").read_text())
    bundle, pairs = tiny_bundle(), load_pairs(chosen.data).split("val").with_captions()
    prompts = Prompts(
        labels=("blue", "green", "red"),  # of all splits, so that chance is a third
        words=("blue", "green", "red"),
        templates=("a {} square", "{}"),
        ks=(1, 2, 5),
    )
    inputs = PictureInputs(pairs, bundle.eval_transform)
    expected = measure_zeroshot(
        bundle.model,
        pairs,
        inputs,
        bundle.tokenizer,
        prompts,
        chosen.evaluate,
        torch.device("cpu"),
    )
    assert written["zeroshot"] == expected.to_json()
    assert (expected.images, expected.unlisted, expected.absent) == (6, 3, [5])
    assert written["images"] == 9
    out = capsys.readouterr().out
    assert "zero-shot: 6 images, 3 classes, 2 templates; top-5 left out" in out
    assert "top-1 %" in out and "top-2 %" in out and "mean per class %" in out
    assert f"{expected.metrics['zeroshot_top1']:.1f}" in out


def test_pictures_with_classes_and_without_captions_are_only_classified(
    tmp_path: Path, labelled: Path, checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    classes = tmp_path / "classes.txt"
    classes.write_text("Red\ngreen\npink\n")
    evaluate(
        config(
            tmp_path,
            labelled,
            f"checkpoint={checkpoint}",
            "data.class_column=label",
            "data.caption_column=",
            f"zeroshot.classes={classes}",
            "zeroshot.templates=simple7",
        )
    )
    written = json.loads((tmp_path / "logs/r/evaluate/manifest-val.json").read_text())
    assert "metrics" not in written
    assert written["zeroshot"]["images"] == 6
    out = capsys.readouterr().out
    assert out.startswith(f"{checkpoint} on manifest/val: zero-shot: 6 images, 3 classes")
    with pytest.raises(ConfigError, match="no measurement of any run"):
        read_entries(tmp_path / "logs")


def test_a_class_list_for_data_without_classes_is_refused_before_measuring(
    tmp_path: Path, manifest: Path, checkpoint: Path
) -> None:
    classes = tmp_path / "classes.txt"
    classes.write_text("red\ngreen\n")
    with pytest.raises(ConfigError, match="pairs.csv does not say what its pictures show"):
        evaluate(
            config(tmp_path, manifest, f"checkpoint={checkpoint}", f"zeroshot.classes={classes}")
        )
