"""The section of the config that says what `twotower index` makes of a store."""

from __future__ import annotations

import enum
from dataclasses import dataclass
from typing import ClassVar

from twotower.settings import Section, setting


class Indexed(enum.Enum):
    """Which embeddings of a store get an index."""

    image = "image"
    text = "text"
    both = "both"


@dataclass(kw_only=True)
class IndexingConfig(Section):
    """Indexes that are built and saved ahead of a search."""

    section: ClassVar[str] = "indexing"

    modality: Indexed = setting(Indexed.image, "image: index pictures; text: captions; or both")
    overwrite: bool = setting(False, "build again what is there already")
    clip_retrieval: bool = setting(
        True, "write what clip-retrieval opens too: image.index, text.index and metadata/"
    )
