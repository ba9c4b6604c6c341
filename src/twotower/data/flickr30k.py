"""Flickr30k in the layouts it is published in (Young, Lai, Hodosh, Hockenmaier 2014)."""

from __future__ import annotations

import csv
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from twotower.data.captioned import Row, captioned_pairs, find_file
from twotower.data.karpathy import DOWNLOAD, read_karpathy
from twotower.data.pairs import DATASETS, PairTable
from twotower.data.splits import SplitConfig, draw_splits
from twotower.data.templates import numbered_lines
from twotower.settings import ConfigError, setting

NAMES = ("flickr30k_images", "flickr30k-images", "images", "Images")
FOLDERS = (".", *NAMES)
SPLITS = "dataset_flickr30k.json"
CAPTIONS = ("results_20130124.token", "results.token", "results.csv", "captions.txt")
# One line of the published table lacks its second bar.
BAR_LINE = re.compile(r"([^|]+)\|\s*(\d+)\s*\|?\s*(.*)")


@dataclass(kw_only=True)
class Flickr30kConfig(SplitConfig):
    """Some 31,000 photographs with five captions each; non-commercial research use."""

    folder: str = setting("dataset/flickr30k", "folder that holds the pictures and their captions")


@DATASETS.register("flickr30k", Flickr30kConfig)
def load_flickr30k(config: Flickr30kConfig) -> PairTable:
    """The photographs that have both a file and captions, in the order of the caption file.

    Captions and splits (29,000 train, 1,014 val, 1,000 test) are Karpathy's if his file is there;
    else captions are the publishers' and the splits are drawn.

    Raises:
        ConfigError: the pictures or the captions are not there or malformed.
    """
    root = Path(config.folder)
    images = _pictures(root)
    splits = find_file(root, FOLDERS, SPLITS)
    captions = splits or find_file(root, FOLDERS, *CAPTIONS)
    if images is None or captions is None:
        lacks = "folder flickr30k_images" if images is None else f"{SPLITS} or {CAPTIONS[0]}"
        raise ConfigError(
            f"Flickr30k is not complete: {root} has no {lacks}; its pictures are at "
            f"https://shannon.cs.illinois.edu/DenotationGraph, captions and splits in {DOWNLOAD}"
        )
    rows = list(_karpathy_rows(captions) if splits else _rows(captions))
    pairs = captioned_pairs(rows, images, root, captions)
    return pairs if splits else draw_splits(pairs, config.val_fraction, config.split_seed)


def _pictures(root: Path) -> Path | None:
    """The folder of the pictures; a well-known copy has it inside another of the same name."""
    for name in NAMES:
        inner, outer = root / name / name, root / name
        if inner.is_dir() or outer.is_dir():
            return inner if inner.is_dir() else outer
    return None


def _karpathy_rows(path: Path) -> Iterator[Row]:
    for image in read_karpathy(path):
        for caption in image.captions:
            yield image.name, caption, image.split


def _rows(path: Path) -> Iterator[Row]:
    """(picture file, caption, no split) of each line of a token file or a table with a header."""
    lines = numbered_lines(path, "Flickr30k needs its captions")
    header = "" if path.suffix == ".token" else lines.pop(0)[1]
    for number, line in lines:
        name, caption = _fields(line, header)
        if not name or not caption:
            raise ConfigError(f"{path}, line {number}: no picture and caption in {line[:80]!r}")
        yield name, caption, ""


def _fields(line: str, header: str) -> tuple[str, str]:
    if not header:
        key, _, caption = line.partition("\t")
        return key.rpartition("#")[0].strip(), caption.strip()
    if "|" in header:
        found = BAR_LINE.fullmatch(line)
        return (found[1].strip(), found[3].strip()) if found else ("", "")
    before = header.count(",")  # image,caption or image_name,comment_number,comment
    name, *rest = next(csv.reader([line]))
    return name.strip(), ",".join(rest[before - 1 :]).strip()
