"""The sections of the config that say what is searched for, and what is done with it."""

from __future__ import annotations

import enum
import math
from dataclasses import dataclass
from typing import ClassVar

from twotower.settings import ConfigError, Section, setting

ALL_SCORES = -math.inf


class Searched(enum.Enum):
    """What a query is compared with: the pictures of a store, or their captions."""

    image = "image"
    text = "text"


@dataclass(kw_only=True)
class SearchConfig(Section):
    """One query's answer."""

    section: ClassVar[str] = "search"

    k: int = setting(25, "results a query", ge=1)
    threshold: float = setting(ALL_SCORES, "results with at least this score only")
    modality: Searched = setting(Searched.image, "image: search pictures; text: captions")
    templates: str = setting(
        "",
        "prompts whose mean stands for a text: openai80, simple7, a file, or one with {} in it; "
        "empty takes the text as it is",
    )
    deduplicate: bool = setting(False, "leave out what is nearly the same as a better result")
    duplicate_cosine: float = setting(
        0.94, "cosine from which on two results are nearly the same", gt=-1, le=1
    )
    grid: bool = setting(True, "write a picture of the results")
    output: str = setting("", "folder of the pictures; by default logs/<run.name>/search")

    def __post_init__(self) -> None:
        super().__post_init__()
        check_threshold("search", self.threshold)


@dataclass(kw_only=True)
class ClassifyConfig(Section):
    """Pictures labelled with the nearest words of a vocabulary."""

    section: ClassVar[str] = "classify"

    vocabulary: str = setting(
        "", "a file or an http(s) URL: a word a line (or a label, a tab, words), or a JSON tree"
    )
    max_megabytes: float = setting(16.0, "largest vocabulary that is read, in MB", gt=0)
    refresh: bool = setting(False, "fetch a URL again instead of taking what is kept of it")
    templates: str = setting(
        "",
        "prompts of a word: openai80, simple7, a file, or one with {} in it; empty is "
        "`a photo of a {}.`",
    )
    k: int = setting(1, "labels a picture", ge=1)
    threshold: float = setting(ALL_SCORES, "labels with at least this score only")
    batch_size: int = setting(32, "pictures or prompts a forward pass", ge=1)
    output: str = setting(
        "", "CSV file of the labels; by default logs/<run.name>/classify/labels.csv"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        check_threshold("classify", self.threshold)


@dataclass(kw_only=True)
class FilterConfig(Section):
    """The best pictures of a query, copied or listed."""

    section: ClassVar[str] = "filtering"

    num_results: int = setting(100, "pictures, at most", ge=1)
    threshold: float = setting(ALL_SCORES, "pictures with at least this score only")

    def __post_init__(self) -> None:
        super().__post_init__()
        check_threshold("filtering", self.threshold)


@dataclass(kw_only=True)
class FeedbackConfig(Section):
    """Hits marked good or bad at the prompt, and the query that follows (Rocchio 1971)."""

    section: ClassVar[str] = "feedback"

    query_weight: float = setting(1.0, "weight of the query as it was asked", ge=0)
    good_weight: float = setting(0.75, "weight of the mean of the good hits", ge=0)
    bad_weight: float = setting(0.15, "weight of the mean of the bad hits, subtracted", ge=0)


def check_threshold(section: str, threshold: float) -> None:
    """Refuse what is no score.

    Raises:
        ConfigError: it is not a number.
    """
    if math.isnan(threshold):
        raise ConfigError(f"{section}.threshold must be a score, such as 0.25, not nan")
