"""Pictures in class folders, ImageNet's and Tiny-ImageNet's too, captioned by prompt templates."""

from __future__ import annotations

import logging
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import pyarrow as pa

from twotower.data.folder import SPLIT_FOLDERS, list_pictures
from twotower.data.pairs import DATASETS, PairTable
from twotower.data.splits import SplitConfig, with_val
from twotower.data.templates import numbered_lines, templated, text_or_templates, words_of
from twotower.settings import ConfigError, setting

log = logging.getLogger(__name__)

NAME_FILES = ("words.txt", "LOC_synset_mapping.txt")
SYNSET = re.compile(r"n\d{8}")
IMAGENET_CLASSES = 1000


@dataclass(kw_only=True)
class ClassFoldersConfig(SplitConfig):
    """Pictures whose folder says what they show: class/*.png or train/class/*.png."""

    folder: str = setting("", "folder of the class folders, or of train, val and test with them")
    templates: str = setting(
        "a photo of a {}.",
        "captions of a class: one text with {} in it, simple7, openai80, or a file, one a line",
    )
    names: str = setting(
        "",
        "file with a class folder, a tab and words in each line; by default words.txt or "
        "LOC_synset_mapping.txt of the folder, else the folder's own name",
    )


@DATASETS.register("class_folders", ClassFoldersConfig)
def load_class_folders(config: ClassFoldersConfig) -> PairTable:
    """The pictures in the order of their paths, with the columns `class` (words) and `folder`.

    Without a folder of their own, validation images are drawn from the training images.

    Raises:
        ConfigError: the folder, its pictures or classes, or a file that it needs are missing.
    """
    if not config.folder:
        raise ConfigError("data.folder is not given; set it to a folder of class folders")
    root = Path(config.folder)
    if not root.is_dir():
        raise ConfigError(f"there is no folder {root}; data.folder must name one of class folders")
    templates = text_or_templates(config.templates)
    files = list_pictures(root)
    if not files:
        raise ConfigError(f"{root} has no pictures")
    labelled = list(_labelled(root, files))
    if not labelled:
        raise ConfigError(f"{root} has pictures but no class folders; move them into one a class")
    if len(labelled) < len(files):
        count = len(files) - len(labelled)
        log.warning("%s: left out %d pictures whose class is not known", root, count)
    labels = [label for _, _, label in labelled]
    names = _names(root, config.names, sorted(set(labels)))
    table = pa.table(
        {
            "filepath": _texts(str(file) for file, _, _ in labelled),
            "captions": templated([words_of(names[label]) for label in labels], templates),
            "split": _texts(split for _, split, _ in labelled),
            "image_id": _texts(str(file) for file, _, _ in labelled),
            "class": _texts(names[label] for label in labels),
            "folder": _texts(labels),
        }
    )
    pairs = PairTable(table, root, str(root))
    return with_val(pairs, config)


def _texts(texts: Iterable[str]) -> pa.Array:
    return pa.array(texts, pa.large_string())


def _labelled(root: Path, files: list[PurePosixPath]) -> Iterator[tuple[PurePosixPath, str, str]]:
    """Each picture whose class is known, with its split and its class folder."""
    tops = {file.parts[0] for file in files if len(file.parts) > 1}
    splits = {top: SPLIT_FOLDERS[top] for top in tops if top in SPLIT_FOLDERS}
    splits = splits if "train" in splits else {}
    wanted = _wanted(root / "wnids.txt")
    annotated = {top: _annotations(root / top / f"{top}_annotations.txt") for top in splits}
    for file in files:
        split = splits.get(file.parts[0], "")
        if splits and not split:
            continue
        label = _label(file, annotated.get(file.parts[0]), depth=2 if split else 1)
        if label is not None and (wanted is None or label in wanted):
            yield file, split, label


def _label(file: PurePosixPath, annotations: dict[str, str] | None, depth: int) -> str | None:
    if annotations is not None:
        return annotations.get(file.name)
    # Tiny-ImageNet's test pictures lie in test/images, which says nothing.
    folders = file.parts[depth - 1 : -1]
    return folders[0] if folders and folders != ("images",) else None


def _wanted(path: Path) -> set[str] | None:
    """The classes that Tiny-ImageNet's wnids.txt lists; None without it."""
    if not path.is_file():
        return None
    return {line.strip() for _, line in numbered_lines(path, "the list of classes")}


def _annotations(path: Path) -> dict[str, str] | None:
    """File name -> class of Tiny-ImageNet's val_annotations.txt; None without it."""
    if not path.is_file():
        return None
    found = {}
    for number, line in numbered_lines(path, "the classes of the pictures"):
        name, _, rest = line.partition("\t")
        label = rest.partition("\t")[0].strip()
        if not name or not label:
            raise ConfigError(f"{path}, line {number}: no file, tab and class in {line[:80]!r}")
        found[name] = label
    return found


def _names(root: Path, chosen: str, labels: list[str]) -> dict[str, str]:
    """The words of each class folder, no two alike."""
    known: dict[str, str] = {}
    paths = [Path(chosen)] if chosen else [root / name for name in NAME_FILES]
    for path in paths:
        if chosen or path.is_file():
            known |= _read_names(path, set(labels))
    if chosen and not known:
        raise ConfigError(
            f"{chosen} names none of the classes of {root}, for example {labels[0]}; "
            "a line is a class folder, a tab and words"
        )
    if not known and len(labels) == IMAGENET_CLASSES and all(map(SYNSET.fullmatch, labels)):
        import open_clip

        known = dict(zip(labels, open_clip.IMAGENET_CLASSNAMES, strict=True))
    full = {label: known.get(label, label) for label in labels}
    short = {label: name.split(",")[0].strip() for label, name in full.items()}
    names = _apart(short, full)
    return _apart(names, {label: f"{name} ({label})" for label, name in names.items()})


def _apart(names: dict[str, str], longer: dict[str, str]) -> dict[str, str]:
    """`names`, but the longer name where several classes share one."""
    counts = Counter(words_of(name).casefold() for name in names.values())
    return {
        label: longer[label] if counts[words_of(name).casefold()] > 1 else name
        for label, name in names.items()
    }


def _read_names(path: Path, labels: set[str]) -> dict[str, str]:
    """Class folder -> words, of the lines `n01440764<tab or space>tench, Tinca tinca`."""
    names = {}
    for number, line in numbered_lines(path, "data.names must be a file"):
        label, _, words = line.partition("\t" if "\t" in line else " ")
        if label not in labels:  # WordNet's list has 82,115
            continue
        if not words.strip():
            raise ConfigError(f"{path}, line {number}: a class, a tab and words, not {line!r}")
        names[label] = words.strip()
    return names
