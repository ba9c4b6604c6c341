"""COCO captions: Karpathy's splits, or the official annotations (Chen et al. 2015)."""

from __future__ import annotations

import enum
import logging
import os
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa

from twotower.config import DataConfig
from twotower.data.captioned import find_file
from twotower.data.karpathy import DOWNLOAD, read_json, read_karpathy
from twotower.data.pairs import DATASETS, PairTable
from twotower.data.table import SCHEMA
from twotower.settings import ConfigError, setting

log = logging.getLogger(__name__)

SPLITS = "dataset_coco.json"
YEARS = ("2014", "2017")
FOLDERS = tuple(f"{split}{year}" for year in YEARS for split in ("train", "val", "test"))
IMAGES = "http://images.cocodataset.org"


class CocoSplits(enum.Enum):
    """Whose splits: `auto` takes Karpathy's if his file is there, else the newest official ones."""

    auto = "auto"
    karpathy = "karpathy"
    official2017 = "official2017"
    official2014 = "official2014"


@dataclass(kw_only=True)
class CocoConfig(DataConfig):
    """123,287 photographs with five captions each."""

    folder: str = setting("dataset/coco", "folder that holds train2014, val2014 (or 2017) and JSON")
    splits: CocoSplits = setting(
        CocoSplits.auto, "auto, karpathy, official2017 or official2014: whose train and val"
    )
    restval: bool = setting(True, "Karpathy's 30,504 images restval train too, as is customary")


class CocoImage(NamedTuple):
    """One image: its id, its captions, its split, and what else its annotations say."""

    coco_id: int
    captions: list[str]
    split: str
    url: str | None = None
    width: int | None = None
    height: int | None = None


@DATASETS.register("coco", CocoConfig)
def load_coco(config: CocoConfig) -> PairTable:
    """The photographs that have both a file and captions, in the order of the annotations.

    Raises:
        ConfigError: the pictures or the annotations are not there or malformed.
    """
    root = Path(config.folder)
    kind, paths = _annotations(root, config.splits)
    if kind is CocoSplits.karpathy:
        listed = list(_of_karpathy(paths[0], config.restval))
    else:
        listed = [image for path in paths for image in _official(path)]
    pictures = _pictures(root)
    found = [(i, pictures[i.coco_id]) for i in listed if i.coco_id in pictures]
    if not found:
        raise ConfigError(
            f"COCO is not complete: {root} has none of the {len(listed):,} pictures of "
            f"{paths[0].name}; unpack {IMAGES}/zips/train2017.zip and val2017.zip there"
        )
    if len(found) < len(listed):
        log.warning("%s: left out %d images that have no file", root, len(listed) - len(found))
    columns: dict[str, Any] = {
        "filepath": [path for _, path in found],
        "captions": [image.captions for image, _ in found],
        "split": [image.split for image, _ in found],
        "image_id": [str(image.coco_id) for image, _ in found],
    }
    table = pa.table(columns, schema=SCHEMA)
    extra = {
        "url": pa.large_string(),
        "width": pa.int64(),
        "height": pa.int64(),
    }
    for name, type_ in extra.items():
        values = [getattr(image, name) for image, _ in found]
        if any(value is not None for value in values):
            table = table.append_column(name, pa.array(values, type_))
    return PairTable(table, root, str(root))


def _annotations(root: Path, wanted: CocoSplits) -> tuple[CocoSplits, list[Path]]:
    """Whose splits they are, and their files."""
    karpathy = find_file(root, (".", "annotations"), SPLITS)
    there = {CocoSplits.karpathy: [] if karpathy is None else [karpathy]}
    for kind in (CocoSplits.official2017, CocoSplits.official2014):
        year = kind.value.removeprefix("official")
        names = [f"captions_{split}{year}.json" for split in ("train", "val")]
        found = [find_file(root, ("annotations", "."), name) for name in names]
        there[kind] = [path for path in found if path is not None]
    for kind, paths in there.items():
        if paths and wanted in (kind, CocoSplits.auto):
            return kind, paths
    lacks, year = SPLITS, YEARS[-1]
    if wanted not in (CocoSplits.auto, CocoSplits.karpathy):
        year = wanted.value.removeprefix("official")
        lacks = f"annotations/captions_train{year}.json"
    raise ConfigError(
        f"COCO is not complete: {root} has no {lacks}; Karpathy's splits are in {DOWNLOAD}, the "
        f"official ones in {IMAGES}/annotations/annotations_trainval{year}.zip"
    )


def _of_karpathy(path: Path, restval: bool) -> Iterator[CocoImage]:
    for image in read_karpathy(path):
        split = "train" if restval and image.split == "restval" else image.split
        if image.coco_id is None:
            raise ConfigError(f"{path} is not of COCO: {image.name} has no cocoid")
        if image.captions:
            yield CocoImage(image.coco_id, image.captions, split)


def _official(path: Path) -> Iterator[CocoImage]:
    split = "train" if "train" in path.name else "val"
    content = read_json(path)
    captions: defaultdict[int, list[str]] = defaultdict(list)
    try:
        for note in content["annotations"]:
            if text := note["caption"].strip():
                captions[note["image_id"]].append(text)
        for image in content["images"]:
            if image["id"] in captions:
                yield CocoImage(
                    image["id"],
                    captions[image["id"]],
                    split,
                    image.get("coco_url"),
                    image.get("width"),
                    image.get("height"),
                )
    except (KeyError, TypeError, AttributeError) as error:
        raise ConfigError(
            f"{path} has no images and annotations with captions ({error!r}); take the one in "
            f"{IMAGES}/annotations/annotations_trainval2017.zip"
        ) from error


def _pictures(root: Path) -> dict[int, str]:
    """The pictures' paths by id: the releases of 2014 and 2017 name the same files differently."""
    found: dict[int, str] = {}
    for folder in (place for name in FOLDERS for place in (name, f"images/{name}")):
        if not (root / folder).is_dir():
            continue
        for name in os.listdir(root / folder):
            digits = Path(name).stem.rpartition("_")[2]  # COCO_train2014_000000000009.jpg
            if digits.isdecimal():
                found.setdefault(int(digits), f"{folder}/{name}")
    return found
