import json
import logging
from pathlib import Path

import pytest

from tests.data.test_flickr8k import captions
from tests.data.test_folder import touch
from twotower.data.flickr30k import Flickr30kConfig, load_flickr30k
from twotower.data.pairs import PairTable
from twotower.settings import ConfigError

NAMES = [f"{1000092795 + n}.jpg" for n in range(6)]
CAPTIONS = {name: [f"Two men, number {k} of {name[-5]} ." for k in range(5)] for name in NAMES}
SPLITS = ["train"] * 4 + ["val", "test"]


def load(folder: Path, **settings: object) -> PairTable:
    return load_flickr30k(Flickr30kConfig(folder=str(folder), **settings))


def refusal(folder: Path) -> str:
    with pytest.raises(ConfigError) as caught:
        load(folder)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def karpathy(name: str, number: int, split: str, texts: list[str]) -> dict[str, object]:
    sentences = [
        {"tokens": text.lower().split(), "raw": text, "imgid": number, "sentid": 5 * number + k}
        for k, text in enumerate(texts)
    ]
    ids = [sentence["sentid"] for sentence in sentences]
    image = {"sentids": ids, "imgid": number, "sentences": sentences, "split": split}
    return {**image, "filename": name}


def write_karpathy(path: Path) -> None:
    images = [
        karpathy(name, number, split, CAPTIONS[name])
        for number, (name, split) in enumerate(zip(NAMES, SPLITS, strict=True))
    ]
    path.write_text(json.dumps({"images": images, "dataset": "flickr30k"}))


def token(root: Path) -> None:
    touch(root, *(f"flickr30k-images/{name}" for name in NAMES))
    lines = [f"{n}#{k}\t{c}\n" for n in NAMES for k, c in enumerate(CAPTIONS[n])]
    (root / "results_20130124.token").write_text("".join(lines))


def kaggle(root: Path) -> None:
    touch(root, *(f"flickr30k_images/flickr30k_images/{name}" for name in NAMES))
    lines = [f"{n}| {k}| {c}\n" for n in NAMES for k, c in enumerate(CAPTIONS[n])]
    lines[4] = lines[4].replace("| 4|", "| 4  ")  # as 2199200615.jpg in the published file
    header = "image_name| comment_number| comment\n"
    (root / "flickr30k_images/results.csv").write_text(header + "".join(lines))


def commas(root: Path, columns: int) -> None:
    touch(root, *(f"Images/{name}" for name in NAMES))
    number = ["", ",comment_number"][columns - 2]
    lines = [
        f'{n}{f",{k}" if number else ""},"{c}"\n' for n in NAMES for k, c in enumerate(CAPTIONS[n])
    ]
    (root / "captions.txt").write_text(f"image_name{number},comment\n" + "".join(lines))


def test_every_layout_gives_the_same_captions(tmp_path: Path) -> None:
    token(tmp_path / "token")
    kaggle(tmp_path / "kaggle")
    commas(tmp_path / "two", 2)
    commas(tmp_path / "three", 3)
    token(tmp_path / "karpathy")
    write_karpathy(tmp_path / "karpathy/dataset_flickr30k.json")
    for name in ("token", "kaggle", "two", "three", "karpathy"):
        pairs = load(tmp_path / name)
        assert captions(pairs) == CAPTIONS
        assert pairs.path(0).is_file()


def test_karpathys_splits_and_drawn_ones(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    token(tmp_path)
    drawn = load(tmp_path, val_fraction=0.5)
    assert len(drawn.split("val")) == 3
    write_karpathy(tmp_path / "dataset_flickr30k.json")
    assert load(tmp_path).table["split"].to_pylist() == SPLITS
    (tmp_path / "flickr30k-images" / NAMES[0]).unlink()
    with caplog.at_level(logging.WARNING):
        assert load(tmp_path).table["split"].to_pylist() == SPLITS[1:]
    assert "left out 1 images that have no file" in caplog.text


def test_each_mistake_has_its_sentence(tmp_path: Path) -> None:
    assert "has no folder flickr30k_images; its pictures are at https://" in refusal(tmp_path)
    touch(tmp_path, f"flickr30k_images/{NAMES[0]}")
    assert "has no dataset_flickr30k.json or results_20130124.token" in refusal(tmp_path)
    (tmp_path / "results.csv").write_text("image_name| comment_number| comment\nx.jpg a dog\n")
    assert "line 2: no picture and caption in 'x.jpg a dog'" in refusal(tmp_path)
    (tmp_path / "results.csv").write_text("image_name| comment_number| comment\n")
    assert "results.csv has no captions" in refusal(tmp_path)
    path = tmp_path / "dataset_flickr30k.json"
    path.write_text('{"images": [{"filename": "a.jpg"')
    assert "is not whole JSON (Expecting" in refusal(tmp_path)
    path.write_text('{"images": [{"filename": "a.jpg", "split": "train"}]}')
    assert "no list of images with filename, sentences and split (KeyError" in refusal(tmp_path)
    path.write_text("[1]")
    assert "no list of images" in refusal(tmp_path)
