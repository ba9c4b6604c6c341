"""The encode section of the config: the export of embeddings."""

from __future__ import annotations

import enum
from dataclasses import dataclass
from typing import ClassVar

from twotower.settings import ConfigError, Section, setting
from twotower.train_config import Precision

AUTO = "auto"


class StoreDtype(enum.Enum):
    """What an embedding store holds."""

    fp16 = "fp16"
    fp32 = "fp32"


class Rows(enum.Enum):
    """What one row of an embedding store is."""

    images = "images"
    pairs = "pairs"


@dataclass(kw_only=True)
class EncodeConfig(Section):
    """The export of embeddings."""

    section: ClassVar[str] = "encode"

    output: str = setting("", "store folder; by default models/<run.name>/store")
    split: str = setting("", "split to encode; empty is every image")
    rows: Rows = setting(Rows.images, "images: one row an image; pairs: one row a caption")
    images: bool = setting(True, "write image embeddings")
    texts: bool = setting(True, "write caption embeddings where there are captions")
    dtype: StoreDtype = setting(StoreDtype.fp16, "fp16 or fp32")
    precision: Precision = setting(Precision.fp32, "what the towers compute in: fp32, bf16 or fp16")
    compile: bool = setting(False, "compile the towers with torch.compile; pays for many images")
    metadata: bool = setting(True, "write the source's own columns (url, class, ...) too")
    limit: int = setting(0, "encode the first so many images; 0 is all", ge=0)
    image_key: str = setting("", "of tars in path=: extensions of pictures, as data.image_key has")
    caption_key: str = setting(
        "", "of tars in path=: extensions of captions or json.<field>, as data.caption_key has"
    )
    cache: str = setting("", "of tars in path=: folder of indexes and copies, as data.cache has")
    batch_size: int | str = setting(64, "rows a forward pass; auto finds out what is fast")
    shard_rows: int = setting(65536, "source rows a shard file", ge=1)
    num_workers: int = setting(0, "processes a rank that load images", ge=0)
    shard: int = setting(0, "do only the shards that are this modulo num_shards", ge=0)
    num_shards: int = setting(1, "jobs that share the work, one a value of shard", ge=1)
    update: bool = setting(False, "encode only what has changed since the store was finished")
    overwrite: bool = setting(False, "encode a finished store anew")
    legacy_output: str = setting(
        "", "empty folder for a copy of the image vectors as .pt files of paths and vectors"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        number = isinstance(self.batch_size, int) and self.batch_size >= 1
        if not number and self.batch_size != AUTO:
            raise ConfigError(
                f"encode.batch_size must be at least 1, or auto, not {self.batch_size}"
            )
        if self.compile and self.batch_size == AUTO:
            raise ConfigError(
                "encode.compile=true takes a minute for each batch size that is tried, so give "
                "encode.batch_size a number"
            )
        if self.update and self.overwrite:
            raise ConfigError("encode.update and encode.overwrite are both true; choose one")
        if self.legacy_output and not self.images:
            raise ConfigError(
                "encode.legacy_output is a copy of the image vectors, and encode.images is false"
            )
        if self.shard >= self.num_shards:
            raise ConfigError(
                f"encode.shard must be below encode.num_shards={self.num_shards}, not {self.shard}"
            )

    @property
    def known_batch_size(self) -> int:
        """The batch size, or 0 where it is still to be found."""
        return self.batch_size if isinstance(self.batch_size, int) else 0


@dataclass(kw_only=True)
class StoresConfig(Section):
    """What `twotower store` does with finished stores."""

    section: ClassVar[str] = "stores"

    inputs: list[str] = setting([], "the stores that `store merge` joins")
    sample: int = setting(64, "rows that `store verify` encodes again", ge=0)
