"""A folder of pictures: with .txt files beside them, in class folders, or just pictures."""

from __future__ import annotations

import enum
import logging
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import pyarrow as pa

from twotower.data.images import SUFFIXES
from twotower.data.pairs import DATASETS, Pair, PairTable
from twotower.data.splits import SplitConfig, with_val
from twotower.settings import ConfigError, setting

log = logging.getLogger(__name__)

SPLIT_FOLDERS = {
    "train": "train",
    "val": "val",
    "valid": "val",
    "validation": "val",
    "dev": "val",
    "test": "test",
}


class CaptionsFrom(enum.Enum):
    """Where a folder's captions are."""

    auto = "auto"
    text = "text"
    classes = "classes"
    none = "none"


@dataclass(kw_only=True)
class FolderConfig(SplitConfig):
    """Pictures in a folder, however deep."""

    folder: str = setting("", "the folder; train, val and test in it are taken as splits")
    captions: CaptionsFrom = setting(
        CaptionsFrom.auto,
        "text: a .txt beside each picture, a caption a line; classes: the folder names the class; "
        "none; auto: text if there is one, classes if every picture is in one of several folders, "
        "else none",
    )
    template: str = setting("a photo of a {}", "caption of a class; {} is the class")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.template.count("{}") != 1:
            raise ConfigError(f"data.template must hold {{}} once, not {self.template!r}")


@DATASETS.register("folder", FolderConfig)
def load_folder(config: FolderConfig) -> PairTable:
    """The pictures of a folder in the order of their paths; class folders add the column `class`.

    Without a folder of their own, validation images are drawn from the training images.

    Raises:
        ConfigError: there is no such folder, or it lacks pictures or the captions asked for.
    """
    if not config.folder:
        raise ConfigError("data.folder is not given; set it to a folder of pictures")
    root = Path(config.folder)
    if not root.is_dir():
        raise ConfigError(f"there is no folder {root}; data.folder must name a folder of pictures")
    files = list_pictures(root)
    if not files:
        raise ConfigError(f"{root} has no pictures ({' '.join(SUFFIXES)})")
    splits = split_folders(files)
    if splits:
        outside = sum(file.parts[0] not in splits for file in files)
        if outside:
            log.warning("%s: left out %d pictures outside %s", root, outside, ", ".join(splits))
        files = [file for file in files if file.parts[0] in splits]
    depth = 2 if splits else 1  # of a class folder
    kind = config.captions
    if kind is CaptionsFrom.auto:
        kind = _guess(root, files, depth)
        log.info("%s: %d pictures, captions from: %s", root, len(files), kind.name)
    if kind is CaptionsFrom.classes and any(len(file.parts) <= depth for file in files):
        raise ConfigError(
            f"{root} has pictures outside class folders; move them, or use data.captions=none"
        )
    captions = {file: _captions(root, file, kind, config.template) for file in files}
    files = _without_missing(root, captions, kind)
    pairs = PairTable.from_pairs(
        (
            Pair(str(file), caption, splits.get(file.parts[0], ""), str(file))
            for file in files
            for caption in (*captions[file],) or (None,)
        ),
        root,
        str(root),
    )
    if kind is CaptionsFrom.classes:
        classes = pa.array([file.parent.name for file in files], pa.large_string())
        pairs = PairTable(pairs.table.append_column("class", classes), root, pairs.name)
    return with_val(pairs, config)


def list_pictures(root: Path) -> list[PurePosixPath]:
    """Every picture under a folder but the hidden ones, relative to it and sorted."""
    return sorted(_walk(root))


def _walk(root: Path) -> Iterator[PurePosixPath]:
    been: set[str] = set()
    for folder, subfolders, names in os.walk(root, followlinks=True, onerror=_left_out):
        real = os.path.realpath(folder)
        if real in been:  # a link to a folder above it
            subfolders.clear()
            continue
        been.add(real)
        subfolders[:] = sorted(n for n in subfolders if not n.startswith((".", "__MACOSX")))
        relative = PurePosixPath(Path(folder).relative_to(root).as_posix())
        for name in names:
            if name.lower().endswith(SUFFIXES) and not name.startswith("."):
                try:
                    name.encode()
                except UnicodeEncodeError:
                    log.warning("%r: left out, because its name is not UTF-8", name)
                else:
                    yield relative / name


def _left_out(error: OSError) -> None:
    log.warning("%s: left out, because it cannot be listed: %s", error.filename, error.strerror)


def split_folders(files: list[PurePosixPath]) -> dict[str, str]:
    """Top folders that are splits, and which: train and at least one other, or none."""
    tops = {file.parts[0] for file in files if len(file.parts) > 1}
    found = {folder: split for folder, split in SPLIT_FOLDERS.items() if folder in tops}
    return found if "train" in found and len(found) > 1 else {}


def _guess(root: Path, files: list[PurePosixPath], depth: int) -> CaptionsFrom:
    if any((root / file).with_suffix(".txt").is_file() for file in files):
        return CaptionsFrom.text
    one_deep = all(len(file.parts) == depth + 1 for file in files)
    if one_deep and len({file.parent.name for file in files}) > 1:  # not a lone folder `images`
        return CaptionsFrom.classes
    return CaptionsFrom.none


def _captions(root: Path, file: PurePosixPath, kind: CaptionsFrom, template: str) -> list[str]:
    if kind is CaptionsFrom.none:
        return []
    if kind is CaptionsFrom.classes:
        return [template.replace("{}", file.parent.name.replace("_", " ").strip())]
    path = (root / file).with_suffix(".txt")
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except FileNotFoundError:
        return []
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path} is not UTF-8 text") from error
    return [line.strip() for line in lines if line.strip()]


def _without_missing(
    root: Path, captions: dict[PurePosixPath, list[str]], kind: CaptionsFrom
) -> list[PurePosixPath]:
    """The pictures that have the captions which were asked for."""
    if kind is CaptionsFrom.none:
        return list(captions)
    files = [file for file, found in captions.items() if found]
    if not files:
        raise ConfigError(
            f"{root} has no .txt file with captions beside a picture; use data.captions=none"
        )
    if len(files) < len(captions):
        log.warning("%s: left out %d pictures without captions", root, len(captions) - len(files))
    return files
