"""What a zero-shot classifier is told: classes, and the templates that make prompts of them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from twotower.config import ZeroShotConfig
from twotower.data.pairs import PairTable
from twotower.data.templates import PLACE, load_templates, numbered_lines, words_of
from twotower.settings import ConfigError

__all__ = ["Prompts", "load_templates", "no_classes", "read_classes", "zeroshot_prompts"]


@dataclass(frozen=True, kw_only=True)
class Prompts:
    """A classifier in words.

    Attributes:
        labels: what the data calls each class.
        words: what a prompt calls it.
        templates: texts with `{}` for the words.
        ks: which top-k accuracies are asked for.
    """

    labels: tuple[str, ...]
    words: tuple[str, ...]
    templates: tuple[str, ...]
    ks: tuple[int, ...] = (1, 5)

    def of_class(self, number: int) -> list[str]:
        """The prompts of one class, one a template."""
        return [template.replace(PLACE, self.words[number]) for template in self.templates]

    def texts(self) -> list[str]:
        """Every prompt, class by class: what a cache of a locked text tower has to hold."""
        return [text for number in range(len(self.words)) for text in self.of_class(number)]

    def rows_of(self, pairs: PairTable) -> Tensor:
        """The number of each image's class: (N,) int64, -1 where it has none or another one.

        A label counts as it stands or, without one that does, whatever its case and underscores.

        Raises:
            ConfigError: the images have no classes, or none of these.
        """
        found = pairs.classes()
        if found is None:
            raise no_classes(pairs)
        exact = {label: number for number, label in enumerate(self.labels)}
        loose = {_loose(label): number for label, number in exact.items()}
        number_of = {
            label: exact.get(label, loose.get(_loose(label), -1))
            for label in dict.fromkeys(found)
            if label is not None
        }
        if not any(number >= 0 for number in number_of.values()):
            raise ConfigError(
                f"no picture of {pairs.name} shows one of the classes {_some(self.labels)}; "
                f"it has {_some(list(number_of))}"
            )
        return torch.tensor([-1 if label is None else number_of[label] for label in found])


def zeroshot_prompts(
    config: ZeroShotConfig, source: PairTable, measured: PairTable
) -> Prompts | None:
    """The classifier that a config asks for; None where neither it nor the data has classes.

    Args:
        source: all images, since a split or a part of them may lack classes and so be easier.
        measured: the images that are to be classified.

    Raises:
        ConfigError: a file is missing or malformed, or is given and the images have no classes.
    """
    here = measured.classes()
    if config.classes:
        if here is None:
            raise no_classes(measured)
        labels, words = read_classes(Path(config.classes))
    else:
        labels = sorted({label for label in source.classes() or () if label is not None})
        words = [words_of(label) for label in labels]
        if len(labels) < 2 or here is None or not any(here):
            return None
    return Prompts(
        labels=tuple(labels),
        words=tuple(words),
        templates=tuple(load_templates(config.templates)),
        ks=tuple(sorted(set(config.top_k))),
    )


def no_classes(pairs: PairTable) -> ConfigError:
    """The refusal of data that do not say what their pictures show."""
    return ConfigError(
        f"{pairs.name} does not say what its pictures show; zero-shot classification takes class "
        "folders, or a manifest with the column class (data.class_column names another)"
    )


def read_classes(path: Path) -> tuple[list[str], list[str]]:
    """The classes of a file, one a line: labels and words.

    A line is what both the data and a prompt call the class or, with a tab, first the one and then
    the other (`n02123045<tab>tabby cat`).

    Raises:
        ConfigError: the file is missing, names a class twice, or has fewer than two.
    """
    labels, words = [], []
    for number, line in numbered_lines(path, "zeroshot.classes must be a file with a class a line"):
        label, rest = line.partition("\t")[0].strip(), line.partition("\t")[2].strip()
        if not label or ("\t" in line and not rest):
            raise ConfigError(f"{path}, line {number}: a label, a tab and words, not {line!r}")
        labels.append(label)
        words.append(rest or words_of(label))
    twice = [label for label, count in Counter(map(_loose, labels)).items() if count > 1]
    if twice:
        raise ConfigError(f"{path} names the class {twice[0]!r} more than once")
    if len(labels) < 2:
        raise ConfigError(f"{path} has one class; to choose between classes it takes two")
    return labels, words


def _loose(label: str) -> str:
    return words_of(label).casefold()


def _some(labels: Sequence[str]) -> str:
    return ", ".join(labels[:3]) + (f" and {len(labels) - 3} more" if len(labels) > 3 else "")
