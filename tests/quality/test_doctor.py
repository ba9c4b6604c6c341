"""Planted faults are found, all of them and no others; what stays opens as a manifest."""

from __future__ import annotations

import csv
import json
import re
from hashlib import sha256
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from PIL import Image

from tests.helpers import tiny_bundle
from tests.quality.pictures import cropped, encoded, photograph, resized, write
from twotower.commands.doctor import run
from twotower.config import Config, FreeText
from twotower.data.manifest import ManifestConfig, load_manifest
from twotower.doctor_config import DoctorConfig
from twotower.hydra_app import compose
from twotower.quality import doctor
from twotower.settings import ConfigError

COUNT = 36  # untouched files, the last six of them for validation


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, str]]:
    """A manifest of whole pictures and planted ones, and which finding each planted one is."""
    folder = tmp_path_factory.mktemp("source")
    images = [photograph(seed) for seed in range(COUNT)]
    rows = []
    for number, image in enumerate(images):
        write(folder / f"{number:02d}.jpg", image)
        split = "train" if number < COUNT - 6 else "val"
        rows += [(f"{number:02d}.jpg", text, split, number % 3) for text in ("a thing", "it is")]
    planted: dict[str, tuple[bytes, str]] = {
        "cut.jpg": (encoded(images[0])[:3000], "truncated"),
        "text.jpg": (b"<html>", "unreadable"),
        "bomb.png": (encoded(Image.new("1", (1100, 1000)), "PNG"), "huge"),
        "same.jpg": (encoded(images[1]), "duplicate"),
        "resized.jpg": (encoded(resized(images[2])), "near_duplicate"),
        "cropped.jpg": (encoded(cropped(images[3])), "near_duplicate"),
        "quality.jpg": (encoded(images[4], quality=70), "near_duplicate"),
        "leak.jpg": (encoded(images[-1]), "leak"),
        "near_leak.jpg": (encoded(cropped(images[-2]), quality=70), "near_leak"),
        "cmyk.jpg": (encoded(photograph(90).convert("CMYK")), "cmyk"),
    }
    for name, (data, _) in planted.items():
        (folder / name).write_bytes(data)
        rows.append((name, "planted", "train", 0))
    rows += [("00.jpg", "", "train", 0), ("01.jpg", "word " * 90, "train", 1)]
    with (folder / "m.csv").open("w", newline="") as file:
        csv.writer(file).writerows([("filepath", "caption", "split", "class"), *rows])
    return folder / "m.csv", {name: kind for name, (_, kind) in planted.items()}


def examined(source: Path, output: Path, *overrides: str) -> dict[str, Any]:
    run(config(source, output, *overrides), FreeText())
    return json.loads((output / "summary.json").read_text())


def config(source: Path, output: Path, *overrides: str) -> Config:
    given = ["data=manifest", f"data.manifest={source}", f"doctor.output={output}"]
    limits = ["doctor.num_workers=1", "doctor.max_pixels=1000000"]
    return compose([*given, *limits, *overrides], "doctor")


def digests(folder: Path) -> dict[str, str]:
    return {f.name: sha256(f.read_bytes()).hexdigest() for f in folder.iterdir() if f.is_file()}


def test_everything_planted_is_found_and_nothing_else(
    source: tuple[Path, dict[str, str]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    manifest, planted = source
    before = digests(manifest.parent)
    summary = examined(manifest, tmp_path)
    assert digests(manifest.parent) == before
    rows = pq.read_table(tmp_path / "report.parquet").to_pylist()
    found = {row["filepath"]: row["kind"] for row in rows if row["kind"] != "long_caption"}
    assert found == planted
    of = {row["filepath"]: row["of"] for row in rows if row["of"]}
    assert of == {
        "same.jpg": "01.jpg",
        "resized.jpg": "02.jpg",
        "cropped.jpg": "03.jpg",
        "quality.jpg": "04.jpg",
        "leak.jpg": f"{COUNT - 1:02d}.jpg",
        "near_leak.jpg": f"{COUNT - 2:02d}.jpg",
    }
    removed = {row["filepath"] for row in rows if row["removed"]}
    assert removed == planted.keys() - {"cmyk.jpg"}
    assert summary["images_kept"] == COUNT + 1
    assert summary["captions"]["left_out"] == 1
    assert summary["captions"]["left_out_first"] == [f"row {2 * COUNT + 11}: 00.jpg"]
    assert summary["captions"]["too_long"] == 1
    assert summary["classes"]["largest"] == 12 + len(planted)
    said = capsys.readouterr().out
    assert "9 are left out of the cleaned manifest" in said
    cleaned = load_manifest(ManifestConfig(manifest=str(tmp_path / "cleaned.csv")))
    names = {Path(path).name for path in cleaned.table["filepath"].to_pylist()}
    assert names == {*(f"{n:02d}.jpg" for n in range(COUNT)), "cmyk.jpg"}
    assert cleaned.classes() is not None


def test_page_holds_everything_itself(source: tuple[Path, dict[str, str]], tmp_path: Path) -> None:
    manifest, planted = source
    examined(manifest, tmp_path, "doctor.max_shown=2")
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    links = re.findall(r"(?:src|href)=['\"]?([^'\">]*)", page)
    assert len(links) >= 20
    assert all(link.startswith(("data:image/jpeg;base64,", "#")) for link in links)
    assert "<script" not in page
    assert "http" not in re.sub(r"base64,[^'\"]*", "", page)
    assert "<code>01.jpg</code> word word" in page and "row 83: 00.jpg" in page
    for name in planted.keys() - {"quality.jpg", "cropped.jpg", "resized.jpg"}:
        assert name in page
    assert "3 images, 2 shown" in page
    assert page.count("class=pair") == 1 + 2 + 1 + 1


def test_removal_can_be_chosen_and_groups_stay_together(
    source: tuple[Path, dict[str, str]], tmp_path: Path
) -> None:
    manifest, planted = source
    remove = "doctor.remove=[unreadable,truncated,huge,cmyk]"
    summary = examined(manifest, tmp_path, remove, "doctor.manifest_format=parquet", "seed=3")
    assert summary["images_kept"] == COUNT + len(planted) - 4
    pairs = load_manifest(
        ManifestConfig(manifest=str(tmp_path / "cleaned.parquet"), split_column="proposed_split")
    )
    split = dict(
        zip(
            (Path(path).name for path in pairs.table["filepath"].to_pylist()),
            pairs.table["split"].to_pylist(),
            strict=True,
        )
    )
    assert split["same.jpg"] == split["01.jpg"]
    assert split["near_leak.jpg"] == split[f"{COUNT - 2:02d}.jpg"]
    assert list(split.values()).count("val") == round(0.1 * summary["images_kept"])


def test_checkpoint_finds_what_it_cannot_tell_apart(
    source: tuple[Path, dict[str, str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It lists them, beside what is found by pixels, and removes nothing for it."""
    encoder = doctor.Encoder(tiny_bundle())
    monkeypatch.setattr(doctor, "_encoder", lambda config: encoder)
    summary = examined(source[0], tmp_path, "doctor.embedding_similarity=0.5")
    assert summary["findings"]["embedding_duplicate"] > 0
    assert summary["images_kept"] == COUNT + 1
    assert summary["captions"]["length"] == 8
    rows = pq.read_table(tmp_path / "report.parquet").to_pylist()
    near = [row for row in rows if row["kind"] == "embedding_duplicate"]
    assert all(0.5 <= row["similarity"] <= 1.0001 and row["of"] for row in near)
    assert len({row["filepath"] for row in near}) == len(near)
    # What the pixels tell is not told again.
    copies = {row["filepath"] for row in rows if row["kind"].endswith(("leak", "duplicate"))}
    assert len(copies) == len(near) + 6
    assert not {row["of"] for row in near} & {"same.jpg", "leak.jpg", "cut.jpg"}


def test_a_path_is_looked_at_and_not_the_data_section(
    source: tuple[Path, dict[str, str]], tmp_path: Path
) -> None:
    path = source[0].parent / "other.csv"
    path.write_text("filepath,caption\n00.jpg,words\n01.jpg,\n02.jpg,\n")
    run(config(source[0], tmp_path), FreeText(path=str(path)))
    facts = json.loads((tmp_path / "summary.json").read_text())["captions"]
    assert (facts["captions"], facts["left_out"]) == (1, 2)
    path.unlink()


def test_folder_of_broken_pictures_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "broken").mkdir()
    for number in range(2):
        (tmp_path / "broken" / f"{number}.jpg").write_bytes(b"no")
    logs = tmp_path / "logs"
    run(
        compose([f"run.logs_dir={logs}", "doctor.num_workers=1"], "doctor"),
        FreeText(path=str(tmp_path / "broken")),
    )
    (folder,) = (logs / "doctor").iterdir()
    assert folder.name == "broken"
    assert "cleaned.csv" not in (folder / "report.html").read_text(encoding="utf-8")
    assert {file.name for file in folder.iterdir()} == {
        *("report.html", "report.parquet", "scan.parquet", "summary.json")
    }


def test_missing_checkpoint_and_unknown_findings_are_refused(
    source: tuple[Path, dict[str, str]], tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match="no checkpoint at none.safetensors"):
        examined(source[0], tmp_path, "checkpoint=none.safetensors")
    with pytest.raises(ConfigError, match="doctor.remove does not know 'ugly'; it knows unread"):
        DoctorConfig(remove=["ugly"])
