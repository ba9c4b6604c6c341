"""Prompt templates: texts with `{}` for what a picture shows, published ones or a user's."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa

from twotower.settings import ConfigError

PLACE = "{}"
PUBLISHED = ("openai80", "simple7")


def load_templates(name: str, what: str = "zeroshot.templates must be") -> list[str]:
    """The templates `openai80` or `simple7` (Radford et al. 2021), or those of a file, one a line.

    Raises:
        ConfigError: there is no such file, it is empty, or a line of it lacks `{}`.
    """
    if name in PUBLISHED:
        import open_clip

        published: Sequence[Callable[[str], str]] = (
            open_clip.OPENAI_IMAGENET_TEMPLATES
            if name == "openai80"
            else open_clip.SIMPLE_IMAGENET_TEMPLATES
        )
        return [template(PLACE) for template in published]
    lines = numbered_lines(Path(name), f"{what} openai80, simple7 or a file")
    for number, line in lines:
        if PLACE not in line:
            raise ConfigError(
                f"{name}, line {number}: a template must hold {{}} where the class goes, "
                f"as in 'a photo of a {{}}.', not {line[:80]!r}"
            )
    return [line for _, line in lines]


def text_or_templates(value: str, setting: str = "data.templates") -> list[str]:
    """The templates that the value of a setting names, or itself if it is one.

    Raises:
        ConfigError: as `load_templates`.
    """
    if PLACE in value:
        return [value]
    return load_templates(value, f"{setting} must be a text with {{}} in it,")


def templated(words: Sequence[str], templates: Sequence[str]) -> pa.ListArray:
    """A list of captions for each class in words, without a Python text for each."""
    classes = list(dict.fromkeys(words))
    number = {word: place for place, word in enumerate(classes)}
    each = [template.replace(PLACE, word) for word in classes for template in templates]
    first = np.fromiter((number[word] for word in words), np.int64, len(words)) * len(templates)
    places = (first[:, None] + np.arange(len(templates))).ravel()
    offsets = np.arange(len(words) + 1, dtype=np.int32) * len(templates)
    captions = pa.array(each, pa.large_string()).take(pa.array(places))
    return pa.ListArray.from_arrays(pa.array(offsets, pa.int32()), captions)


def numbered_lines(path: Path, what: str) -> list[tuple[int, str]]:
    """The lines of a text file that are not blank, with their numbers.

    Raises:
        ConfigError: the file is missing (the sentence begins with `what`), empty, or not UTF-8.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise ConfigError(f"{what}; {path}: {(error.strerror or str(error)).lower()}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path} is not UTF-8 text") from error
    lines = [(i, line.strip(" \r")) for i, line in enumerate(text.split("\n"), start=1)]
    lines = [(number, line) for number, line in lines if line.strip()]
    if not lines:
        raise ConfigError(f"{what}; {path} is empty")
    return lines


def words_of(label: str) -> str:
    """A class in words: underscores are spaces."""
    return " ".join(label.replace("_", " ").split())
