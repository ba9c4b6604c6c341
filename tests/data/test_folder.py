import logging
import os
from pathlib import Path

import pytest

from tests.helpers import write_pictures
from twotower.data.folder import CaptionsFrom, FolderConfig, load_folder
from twotower.data.pairs import PairTable
from twotower.settings import ConfigError


def load(folder: Path, **settings: object) -> PairTable:
    return load_folder(FolderConfig(folder=str(folder), **settings))


def touch(root: Path, *names: str) -> None:
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()


def files(pairs: PairTable) -> list[str]:
    return pairs.table["filepath"].to_pylist()


def captions(pairs: PairTable) -> dict[str, list[str]]:
    return dict(zip(files(pairs), pairs.table["captions"].to_pylist(), strict=True))


def refusal(folder: Path | str, **settings: object) -> str:
    with pytest.raises(ConfigError) as caught:
        load_folder(FolderConfig(folder=str(folder), **settings))
    return str(caught.value)


def test_captions_beside_the_pictures_a_line_each(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    touch(tmp_path, "b.jpg", "sub/a.PNG", "c.jpg", "notes.txt")
    (tmp_path / "b.txt").write_bytes(b"\xef\xbb\xbfa dog\r\n\r\n  a brown dog \n")
    (tmp_path / "sub/a.txt").write_text("ein Löwe", encoding="utf-8")
    (tmp_path / "c.txt").write_text("\n")
    with caplog.at_level(logging.INFO):
        pairs = load(tmp_path)
    assert captions(pairs) == {"b.jpg": ["a dog", "a brown dog"], "sub/a.PNG": ["ein Löwe"]}
    assert "left out 1 pictures without captions" in caplog.text
    assert "captions from: text" in caplog.text


def test_class_folders(tmp_path: Path) -> None:
    touch(tmp_path, "polar_bear/2.jpg", "polar_bear/1.jpg", "ape/9.jpg")
    pairs = load(tmp_path)
    assert captions(pairs) == {
        "ape/9.jpg": ["a photo of a ape"],
        "polar_bear/1.jpg": ["a photo of a polar bear"],
        "polar_bear/2.jpg": ["a photo of a polar bear"],
    }
    assert pairs.table["class"].to_pylist() == ["ape", "polar_bear", "polar_bear"]
    assert load(tmp_path, template="{x} {}!").captions(0) == ["{x} ape!"]


def test_a_lone_folder_is_no_class(tmp_path: Path) -> None:
    touch(tmp_path, "images/1.jpg", "images/2.jpg")
    assert captions(load(tmp_path)) == {"images/1.jpg": [], "images/2.jpg": []}
    made = captions(load(tmp_path, captions=CaptionsFrom.classes))
    assert made["images/1.jpg"] == ["a photo of a images"]


def test_train_and_val_folders_are_the_splits(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    touch(tmp_path, "train/ape/1.jpg", "validation/ape/2.jpg", "test/dog/3.jpg", "other/dog/4.jpg")
    pairs = load(tmp_path)
    assert dict(zip(files(pairs), pairs.table["split"].to_pylist(), strict=True)) == {
        "test/dog/3.jpg": "test",
        "train/ape/1.jpg": "train",
        "validation/ape/2.jpg": "val",
    }
    assert pairs.table["class"].to_pylist() == ["dog", "ape", "ape"]
    assert "left out 1 pictures outside" in caplog.text


def test_without_a_val_folder_it_is_drawn_from_train(tmp_path: Path) -> None:
    touch(tmp_path, *(f"{split}/{n}.jpg" for split in ("train", "test") for n in range(10)))
    pairs = load(tmp_path, val_fraction=0.2)
    splits = pairs.table["split"].to_pylist()
    assert splits[:10] == ["test"] * 10
    assert (splits.count("train"), splits.count("val")) == (8, 2)


def test_without_split_folders_whole_images_are_drawn(tmp_path: Path) -> None:
    touch(tmp_path, *(f"train/{n}.jpg" for n in range(20)))
    pairs = load(tmp_path, val_fraction=0.2)
    assert len(pairs.split("val")) == 4
    assert pairs.table["split"] != load(tmp_path, val_fraction=0.2, split_seed=1).table["split"]


def test_pictures_alone_in_the_order_of_their_paths(tmp_path: Path) -> None:
    touch(
        tmp_path,
        "z.jpg",
        "a/b/c.webp",
        "a.jpeg",
        "é.png",
        "a/readme.md",
        ".hidden.jpg",
        ".cache/x.jpg",
        "__MACOSX/._z.jpg",
    )
    pairs = load(tmp_path)
    assert files(pairs) == ["a/b/c.webp", "a.jpeg", "z.jpg", "é.png"]
    assert captions(pairs)["z.jpg"] == []
    assert "class" not in pairs.table.column_names


def test_links_are_followed_once(tmp_path: Path) -> None:
    touch(tmp_path, "real/1.jpg", "elsewhere/2.jpg")
    os.symlink(tmp_path, tmp_path / "real/up")
    root = tmp_path / "real"
    os.symlink(tmp_path / "elsewhere", root / "linked")
    found = files(load(root, captions=CaptionsFrom.none))
    assert found[:2] == ["1.jpg", "linked/2.jpg"]
    assert len(found) == 2


def test_a_name_that_is_not_utf8_is_left_out_with_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    touch(tmp_path, "good.jpg")
    (Path(os.fsdecode(os.fsencode(tmp_path) + b"/bad\xff.jpg"))).touch()
    assert files(load(tmp_path)) == ["good.jpg"]
    assert "not UTF-8" in caplog.text


def test_pictures_can_be_decoded_from_their_paths(tmp_path: Path) -> None:
    made = write_pictures(tmp_path / "squares", 3)
    pairs = load(tmp_path)
    assert [pairs.path(row) for row in range(3)] == [path for path, _ in made]


def test_each_mistake_has_its_sentence(tmp_path: Path) -> None:
    assert refusal("") == "data.folder is not given; set it to a folder of pictures"
    assert "there is no folder" in refusal(tmp_path / "none")
    assert "has no pictures (.jpg" in refusal(tmp_path)
    touch(tmp_path, "a.jpg")
    assert "no .txt file with captions" in refusal(tmp_path, captions=CaptionsFrom.text)
    assert "outside class folders" in refusal(tmp_path, captions=CaptionsFrom.classes)
    assert refusal(tmp_path, template="a photo") == (
        "data.template must hold {} once, not 'a photo'"
    )
    touch(tmp_path / "sets", "train/a.jpg", "val/b.jpg")
    assert "outside class folders" in refusal(tmp_path / "sets", captions=CaptionsFrom.classes)
    (tmp_path / "a.txt").write_bytes(b"\xff\xfe")
    assert refusal(tmp_path).endswith("a.txt is not UTF-8 text")
    (tmp_path / "a.txt").unlink()
    (tmp_path / "a.txt").mkdir()
    wrong = refusal(tmp_path, captions=CaptionsFrom.text)
    assert wrong.endswith("a.txt cannot be read: Is a directory")


def test_a_folder_that_cannot_be_listed_is_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    touch(tmp_path, "a/1.jpg", "b/2.jpg")
    scandir = os.scandir

    def refuse(path: str) -> object:
        if str(path).endswith("b"):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    assert files(load(tmp_path)) == ["a/1.jpg"]
    assert "b: left out, because it cannot be listed: Permission denied" in caplog.text
