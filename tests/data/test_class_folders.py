import logging
from pathlib import Path

import pytest

from tests.data.test_folder import captions, files, touch
from twotower.data.class_folders import ClassFoldersConfig, load_class_folders
from twotower.data.pairs import PairTable
from twotower.settings import ConfigError

WORDS = "n00000001\tentity\nn01443537\tgoldfish, Carassius auratus\nn02012849\tcrane\n"
WORDS += "n03126707\tcrane\nn02123045\ttabby, tabby cat\nn02124075\ttabby, Egyptian cat\n"


def load(folder: Path, **settings: object) -> PairTable:
    return load_class_folders(ClassFoldersConfig(folder=str(folder), **settings))


def column(pairs: PairTable, name: str) -> dict[str, str]:
    return dict(zip(files(pairs), pairs.table[name].to_pylist(), strict=True))


def refusal(folder: Path | str, **settings: object) -> str:
    with pytest.raises(ConfigError) as caught:
        load_class_folders(ClassFoldersConfig(folder=str(folder), **settings))
    assert "\n" not in str(caught.value)
    return str(caught.value)


def tiny_imagenet(root: Path) -> None:
    for label in ("n01443537", "n02012849"):
        touch(root, *(f"train/{label}/images/{label}_{n}.JPEG" for n in range(2)))
        (root / f"train/{label}/{label}_boxes.txt").write_text("x\t0\t0\t62\t62\n")
    touch(root, "val/images/val_0.JPEG", "val/images/val_1.JPEG", "test/images/test_0.JPEG")
    (root / "val/val_annotations.txt").write_text(
        "val_0.JPEG\tn02012849\t0\t32\t44\t62\nval_1.JPEG\tn01443537\t52\t55\t57\t59\n"
    )
    (root / "wnids.txt").write_text("n02012849\nn01443537\n")
    (root / "words.txt").write_text(WORDS)


def test_tiny_imagenet(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    tiny_imagenet(tmp_path)
    with caplog.at_level(logging.WARNING):
        pairs = load(tmp_path)
    assert column(pairs, "class") == {
        "train/n01443537/images/n01443537_0.JPEG": "goldfish",
        "train/n01443537/images/n01443537_1.JPEG": "goldfish",
        "train/n02012849/images/n02012849_0.JPEG": "crane",
        "train/n02012849/images/n02012849_1.JPEG": "crane",
        "val/images/val_0.JPEG": "crane",
        "val/images/val_1.JPEG": "goldfish",
    }
    assert pairs.table["split"].to_pylist() == ["train"] * 4 + ["val"] * 2
    assert pairs.table["folder"].to_pylist()[-1] == "n01443537"
    assert captions(pairs)["val/images/val_1.JPEG"] == ["a photo of a goldfish."]
    assert "left out 1 pictures whose class is not known" in caplog.text
    (tmp_path / "wnids.txt").write_text("n01443537\n")
    assert len(load(tmp_path)) == 3


def test_imagenet_and_names_that_two_classes_share(tmp_path: Path) -> None:
    labels = ("n01443537", "n02012849", "n03126707", "n02123045", "n02124075")
    touch(tmp_path, *(f"{split}/{label}/1.JPEG" for split in ("train", "val") for label in labels))
    mapping = "".join(line.replace("\t", " ") + "\n" for line in WORDS.splitlines())
    (tmp_path / "LOC_synset_mapping.txt").write_text(mapping)
    assert [name for _, name in sorted(column(load(tmp_path), "class").items())][:5] == [
        "goldfish",
        "crane (n02012849)",
        "tabby, tabby cat",
        "tabby, Egyptian cat",
        "crane (n03126707)",
    ]


def test_all_of_imagenet_has_openais_names(tmp_path: Path) -> None:
    touch(tmp_path, *(f"n{number:08}/1.JPEG" for number in range(1000)))
    classes = load(tmp_path).classes()
    assert classes is not None
    assert classes[:2] == ["tench", "goldfish"] and len(set(classes)) == 1000


def test_cifar_and_its_templates(tmp_path: Path) -> None:
    touch(tmp_path, *(f"train/{c}/{n:04}.png" for c in ("cat", "fire_truck") for n in range(10)))
    touch(tmp_path, "test/cat/0001.png")
    pairs = load(tmp_path, templates="simple7", val_fraction=0.1)
    assert {split: len(pairs.split(split)) for split in ("train", "val", "test")} == {
        "train": 18,
        "val": 2,
        "test": 1,
    }
    made = captions(pairs)["train/fire_truck/0003.png"]
    assert len(made) == 7 and "itap of a fire truck." in made
    (tmp_path / "t.txt").write_text("{} there\na bad {}\n")
    made = captions(load(tmp_path, templates=str(tmp_path / "t.txt")))["test/cat/0001.png"]
    assert made == ["cat there", "a bad cat"]
    (tmp_path / "n.txt").write_text("fire_truck\tfire engine\n")
    named = load(tmp_path, names=str(tmp_path / "n.txt"))
    assert set(named.classes() or ()) == {"cat", "fire engine"}


def test_without_split_folders_images_are_drawn(tmp_path: Path) -> None:
    touch(tmp_path, *(f"{c}/deep/{n}.png" for c in ("ape", "bee") for n in range(5)))
    pairs = load(tmp_path, val_fraction=0.2)
    assert len(pairs.split("val")) == 2
    assert set(pairs.classes() or ()) == {"ape", "bee"}


def test_each_mistake_has_its_sentence(tmp_path: Path) -> None:
    assert refusal("") == "data.folder is not given; set it to a folder of class folders"
    assert "there is no folder" in refusal(tmp_path / "none")
    assert refusal(tmp_path).endswith("has no pictures")
    touch(tmp_path, "a.jpg")
    assert "no class folders; move them into one a class" in refusal(tmp_path)
    touch(tmp_path, "ape/a.jpg", "bee/a.jpg")
    words = "data.templates must be a text with {} in it, openai80, simple7 or a file; photo: no"
    assert refusal(tmp_path, templates="photo").startswith(words)
    (tmp_path / "n.txt").write_text("cat\ttabby\n")
    assert "names none of the classes" in refusal(tmp_path, names=str(tmp_path / "n.txt"))
    (tmp_path / "n.txt").write_text("ape\n")
    assert "line 1: a class, a tab and words" in refusal(tmp_path, names=str(tmp_path / "n.txt"))
    tiny_imagenet(tmp_path / "tiny")
    (tmp_path / "tiny/val/val_annotations.txt").write_text("val_0.JPEG\n")
    assert "line 1: no file, tab and class in 'val_0.JPEG'" in refusal(tmp_path / "tiny")
