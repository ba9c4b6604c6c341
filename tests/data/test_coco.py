import json
import logging
from pathlib import Path

import pytest

from tests.data.test_flickr8k import captions
from tests.data.test_flickr30k import karpathy
from tests.data.test_folder import files, touch
from twotower.data.coco import CocoConfig, CocoSplits, load_coco
from twotower.data.pairs import PairTable
from twotower.settings import ConfigError

IDS = [391895, 522418, 9, 25, 30]
SPLITS = ["test", "val", "restval", "train", "train"]
FOLDERS = ["val2014", "val2014", "val2014", "train2014", "train2014"]
CAPTIONS = {str(i): [f"caption {k} of {i}" for k in range(5)] for i in IDS}


def load(folder: Path, **settings: object) -> PairTable:
    return load_coco(CocoConfig(folder=str(folder), **settings))


def refusal(folder: Path, **settings: object) -> str:
    with pytest.raises(ConfigError) as caught:
        load(folder, **settings)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def name_2014(coco_id: int, folder: str) -> str:
    return f"COCO_{folder}_{coco_id:012}.jpg"


def write_karpathy(root: Path) -> None:
    images = [
        karpathy(name_2014(i, folder), number, split, CAPTIONS[str(i)])
        | {"filepath": folder, "cocoid": i}
        for number, (i, split, folder) in enumerate(zip(IDS, SPLITS, FOLDERS, strict=True))
    ]
    (root / "dataset_coco.json").write_text(json.dumps({"images": images, "dataset": "coco"}))


def write_official(root: Path, split: str, year: str, ids: list[int]) -> None:
    images = [
        {"id": i, "file_name": f"{i:012}.jpg", "height": 480, "width": 640}
        | {"license": 3, "coco_url": f"http://images.cocodataset.org/x/{i:012}.jpg"}
        for i in ids
    ]
    notes = [
        {"image_id": i, "id": 10 * i + k, "caption": CAPTIONS[str(i)][k] + "\n"}
        for k in range(5)
        for i in ids
    ]
    path = root / "annotations" / f"captions_{split}{year}.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps({"info": {}, "images": images, "annotations": notes}))


def test_karpathys_splits_with_the_folders_of_2014(tmp_path: Path) -> None:
    names = [f"{f}/{name_2014(i, f)}" for i, f in zip(IDS, FOLDERS, strict=True)]
    touch(tmp_path, *names)
    write_karpathy(tmp_path)
    pairs = load(tmp_path)
    assert captions(pairs) == CAPTIONS and files(pairs) == names
    assert pairs.table["split"].to_pylist() == ["test", "val", "train", "train", "train"]
    assert load(tmp_path, restval=False).table["split"].to_pylist() == SPLITS


def test_karpathys_splits_with_the_folders_of_2017(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    names = [f"images/train2017/{i:012}.jpg" for i in IDS[:4]]
    touch(tmp_path, *names)
    write_karpathy(tmp_path)
    with caplog.at_level(logging.WARNING):
        assert files(load(tmp_path)) == names
    assert "left out 1 images that have no file" in caplog.text


def test_the_official_annotations(tmp_path: Path) -> None:
    write_official(tmp_path, "train", "2017", IDS[:3])
    write_official(tmp_path, "val", "2017", IDS[3:])
    write_official(tmp_path, "val", "2014", IDS[:2])
    touch(tmp_path, *(f"train2017/{i:012}.jpg" for i in IDS[:3]))
    touch(tmp_path, *(f"val2017/{i:012}.jpg" for i in IDS[3:]))
    pairs = load(tmp_path)
    assert captions(pairs) == CAPTIONS
    assert pairs.table["split"].to_pylist() == ["train"] * 3 + ["val"] * 2
    copied = tmp_path / "captions_val2017.json"  # a second copy brings no image twice
    copied.write_bytes((tmp_path / "annotations/captions_val2017.json").read_bytes())
    assert load(tmp_path).table == pairs.table
    row = pairs.table.slice(0, 1).to_pylist()[0]
    assert (row["width"], row["height"]) == (640, 480) and row["url"].endswith("391895.jpg")
    old = load(tmp_path, splits=CocoSplits.official2014)
    assert old.table["image_id"].to_pylist() == ["391895", "522418"]


def test_each_mistake_has_its_sentence(tmp_path: Path) -> None:
    assert "has no dataset_coco.json; Karpathy's splits are in https://" in refusal(tmp_path)
    lacks = refusal(tmp_path, splits=CocoSplits.official2017)
    assert "has no annotations/captions_train2017.json" in lacks
    lacks = refusal(tmp_path, splits=CocoSplits.official2014)
    assert lacks.endswith("annotations_trainval2014.zip")
    write_karpathy(tmp_path)
    assert "has none of the 5 pictures of dataset_coco.json; unpack http" in refusal(tmp_path)
    images = [karpathy("1.jpg", 0, "train", ["a dog"])]
    (tmp_path / "dataset_coco.json").write_text(json.dumps({"images": images}))
    assert "is not of COCO: 1.jpg has no cocoid" in refusal(tmp_path)
    write_official(tmp_path, "val", "2017", [9])
    path = tmp_path / "annotations/captions_val2017.json"
    path.write_text(json.dumps({"images": [], "annotations": [{"id": 1}]}))
    wrong = refusal(tmp_path, splits=CocoSplits.official2017)
    assert "has no images and annotations with captions (KeyError('caption'))" in wrong
