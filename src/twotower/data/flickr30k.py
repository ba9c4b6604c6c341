"""Flickr30k in the layouts it is published in (Young, Lai, Hodosh, Hockenmaier 2014)."""

from __future__ import annotations

import csv
import logging
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from twotower.data.karpathy import DOWNLOAD, read_karpathy
from twotower.data.pairs import DATASETS, Pair, PairTable
from twotower.data.splits import SplitConfig, draw_splits
from twotower.settings import ConfigError, setting

log = logging.getLogger(__name__)

NAMES = ("flickr30k_images", "flickr30k-images", "images", "Images")
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
    splits = _find(root, SPLITS)
    captions = splits or next((path for name in CAPTIONS if (path := _find(root, name))), None)
    if images is None or captions is None:
        lacks = "folder flickr30k_images" if images is None else f"{SPLITS} or {CAPTIONS[0]}"
        raise ConfigError(
            f"Flickr30k is not complete: {root} has no {lacks}; its pictures are at "
            f"https://shannon.cs.illinois.edu/DenotationGraph, captions and splits in {DOWNLOAD}"
        )
    rows = list(_karpathy_rows(captions) if splits else _rows(captions))
    files = set(os.listdir(images))
    absent = {name for name, _, _ in rows} - files
    if absent:
        log.warning("%s: left out %d images that have no file", captions, len(absent))
    folder = images.relative_to(root)
    pairs = PairTable.from_pairs(
        (
            Pair(str(folder / name), caption, split, name)
            for name, caption, split in rows
            if name in files
        ),
        root,
        str(root),
    )
    return pairs if splits else draw_splits(pairs, config.val_fraction, config.split_seed)


def _pictures(root: Path) -> Path | None:
    """The folder of the pictures; a well-known copy has it inside another of the same name."""
    for name in NAMES:
        inner, outer = root / name / name, root / name
        if inner.is_dir() or outer.is_dir():
            return inner if inner.is_dir() else outer
    return None


def _find(root: Path, name: str) -> Path | None:
    paths = (root / folder / name for folder in (".", *NAMES))
    return next((path for path in paths if path.is_file()), None)


def _karpathy_rows(path: Path) -> Iterator[tuple[str, str, str]]:
    for image in read_karpathy(path):
        for caption in image.captions:
            yield image.name, caption, image.split


def _rows(path: Path) -> Iterator[tuple[str, str, str]]:
    """(picture file, caption, no split) of each line of a token file or a table with a header."""
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} cannot be read: {error}") from error
    header = "" if path.suffix == ".token" else (lines or [""])[0]
    for number, line in enumerate(lines, start=1):
        if not line.strip() or (header and number == 1):
            continue
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
