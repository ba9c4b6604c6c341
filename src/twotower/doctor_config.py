"""The doctor section of the config: what counts as a finding, and what is left out for it."""

from __future__ import annotations

import enum
from dataclasses import dataclass
from typing import ClassVar

from twotower.settings import ConfigError, Section, setting

MEANINGS = {
    "unreadable": "no picture, or none that can be decoded",
    "truncated": "the file ends before the picture does",
    "damaged": "it decodes, but the data inside is corrupt",
    "huge": "more pixels than doctor.max_pixels: refused without decoding",
    "leak": "the same pixels as an image of another split",
    "near_leak": "nearly an image of another split: re-encoded, resized or cropped",
    "duplicate": "the same pixels as another image of its split",
    "near_duplicate": "nearly another image of its split: re-encoded, resized or cropped",
    "embedding_duplicate": "the checkpoint hardly tells it from another image",
    "tiny": "a side shorter than doctor.min_side",
    "blank": "one colour",
    "cmyk": "four inks instead of red, green and blue",
    "16-bit": "more than 8 bits a value",
    "palette": "colours from a table",
    "alpha": "transparent in places, laid on white",
    "greyscale": "no colours",
    "exif_rotated": "stored turned or mirrored, and turned back by its EXIF tag",
    "animated": "several frames, of which the first is used",
    "no_caption": "an image without a caption",
    "long_caption": "a caption of more tokens than the text tower reads",
}
"""Every finding and what it means, the worst first."""

FAULTS = ("unreadable", "truncated", "damaged", "huge")
COPIES = ("leak", "near_leak", "duplicate", "near_duplicate")
EMBEDDED = "embedding_duplicate"  # a judgement of the model's, on which nothing is removed
TRAITS = tuple(MEANINGS)[tuple(MEANINGS).index("tiny") : tuple(MEANINGS).index("no_caption")]
REMOVABLE = tuple(kind for kind in MEANINGS if kind != EMBEDDED)


class ManifestFormat(enum.Enum):
    """What the cleaned manifest is written as."""

    csv = "csv"
    parquet = "parquet"


@dataclass(kw_only=True)
class DoctorConfig(Section):
    """What is wrong with a data set."""

    section: ClassVar[str] = "doctor"

    output: str = setting("", "folder of the report; by default logs/doctor/<name of the data>")
    num_workers: int = setting(
        0, "processes that verify images; 0 is one a core, 1 works in this process", ge=0
    )
    max_pixels: int = setting(
        89_478_485, "pictures of more pixels are huge: refused without decoding", ge=1
    )
    min_side: int = setting(32, "pictures with a shorter side, in pixels, are tiny", ge=1)
    near_similarity: float = setting(
        0.9, "near duplicates: correlation of the small pictures after alignment", ge=0.8, le=1
    )
    embedding_similarity: float = setting(
        0.95, "the same by embedding, if checkpoint= is given: cosine", gt=0, le=1
    )
    remove: list[str] = setting(
        [*FAULTS, *COPIES], "findings for which an image is left out of the cleaned manifest"
    )
    manifest_format: ManifestFormat = setting(
        ManifestFormat.csv, "the cleaned manifest: csv or parquet"
    )
    val_fraction: float = setting(
        0.1, "share of images that validate in the proposed split", ge=0, lt=1
    )
    max_shown: int = setting(24, "examples of each finding on the page", ge=1, le=1000)

    def __post_init__(self) -> None:
        super().__post_init__()
        for kind in self.remove:
            if kind not in REMOVABLE:
                raise ConfigError(
                    f"doctor.remove does not know {kind!r}; it knows {', '.join(REMOVABLE)}"
                )
