"""Flickr8k in the layouts it is published in (Hodosh, Young, Hockenmaier 2013)."""

from __future__ import annotations

import csv
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from twotower.data.captioned import captioned_pairs, find_file
from twotower.data.karpathy import read_karpathy
from twotower.data.pairs import DATASETS, PairTable
from twotower.data.splits import SplitConfig, draw_splits
from twotower.data.templates import numbered_lines
from twotower.settings import ConfigError, setting

IMAGE_FOLDERS = ("Images", "Flicker8k_Dataset", "Flickr8k_Dataset")
TEXT_FOLDERS = (".", "Flickr8k_text")
LISTS = {"train": "trainImages", "val": "devImages", "test": "testImages"}
UNLISTED = "unlisted"


@dataclass(kw_only=True)
class Flickr8kConfig(SplitConfig):
    """Some 8,000 photographs with five captions each; non-commercial research use."""

    folder: str = setting("dataset/flickr8k", "folder that holds Images and captions.txt")


@DATASETS.register("flickr8k", Flickr8kConfig)
def load_flickr8k(config: Flickr8kConfig) -> PairTable:
    """The photographs that have both a file and captions, in the order of the caption file.

    The published lists (or dataset_flickr8k.json) are the splits train, val (dev) and test; a
    photograph in none of them is `unlisted`. Without any list the splits are drawn.

    Raises:
        ConfigError: the pictures or the captions are not there, or a line is malformed.
    """
    root = Path(config.folder)
    images = next((root / name for name in IMAGE_FOLDERS if (root / name).is_dir()), None)
    captions = find_file(root, TEXT_FOLDERS, "captions.txt", "Flickr8k.token.txt")
    if images is None or captions is None:
        lacks = "Images" if images is None else "captions.txt (or Flickr8k.token.txt)"
        raise ConfigError(
            f"Flickr8k is not complete: {root} has no {lacks}; download it from "
            "https://www.kaggle.com/datasets/adityajn105/flickr8k and unpack it there"
        )
    splits = _splits(root)
    rows = [(name, caption, splits.get(name, UNLISTED)) for name, caption in _rows(captions)]
    pairs = captioned_pairs(rows, images, root, captions)
    return pairs if splits else draw_splits(pairs, config.val_fraction, config.split_seed)


def _rows(path: Path) -> Iterator[tuple[str, str]]:
    """(picture file, caption) of each line of captions.txt or Flickr8k.token.txt."""
    is_csv = path.name == "captions.txt"
    for number, line in numbered_lines(path, "Flickr8k needs its captions"):
        if is_csv and number == 1:
            continue
        if is_csv:
            # Some copies leave captions with commas unquoted.
            name, *rest = next(csv.reader([line]))
            caption = ",".join(rest)
        else:
            key, _, caption = line.partition("\t")
            name = key.rpartition("#")[0]
        if not name or not caption.strip():
            raise ConfigError(f"{path}, line {number}: no picture and caption in {line[:80]!r}")
        yield name, caption.strip()


def _splits(root: Path) -> dict[str, str]:
    """The split of each picture file, from the lists or Karpathy's file; empty without any."""
    splits: dict[str, str] = {}
    karpathy = find_file(root, TEXT_FOLDERS, "dataset_flickr8k.json")
    if karpathy is not None:
        splits.update((image.name, image.split) for image in read_karpathy(karpathy))
    for split, name in LISTS.items():
        path = find_file(root, TEXT_FOLDERS, f"Flickr_8k.{name}.txt")
        if path is not None:
            splits.update(dict.fromkeys(path.read_text(encoding="utf-8").split(), split))
    return splits
