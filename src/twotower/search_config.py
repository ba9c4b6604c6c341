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


def check_threshold(section: str, threshold: float) -> None:
    """Refuse what is no score.

    Raises:
        ConfigError: it is not a number.
    """
    if math.isnan(threshold):
        raise ConfigError(f"{section}.threshold must be a score, such as 0.25, not nan")
