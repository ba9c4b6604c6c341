"""The files of an embedding store: their names, and the manifest that says what they hold."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from twotower.checkpoint.atomic import replacing
from twotower.settings import ConfigError

FORMAT = "twotower embedding store"
VERSION = 1

MANIFEST = "manifest.json"
ERRORS = "errors.parquet"
IMAGES, TEXTS, METADATA = "img_emb", "text_emb", "metadata"
# One file a finished shard while a store is being made; the manifest takes them over.
DONE = "shards"

ERROR_SCHEMA = pa.schema(
    [("source_row", pa.int64()), ("path", pa.string()), ("reason", pa.string())]
)

FloatRows = npt.NDArray[np.float16 | np.float32]
FloatArray = npt.NDArray[np.float32]
IntArray = npt.NDArray[np.int64]

# What makes two encodings of different rows: the field, and what the user calls it.
_IDENTITY = {
    "checkpoint_sha256": "the checkpoint (SHA-256)",
    "source": "the source",
    "source_fingerprint": "the source's paths and captions (fingerprint)",
    "rows_kind": "encode.rows",
    "images": "encode.images",
    "texts": "captions encoded (encode.texts)",
    "dtype": "encode.dtype",
    "precision": "encode.precision",
    "batch_size": "encode.batch_size",
    "shard_rows": "encode.shard_rows",
}


@dataclass(frozen=True, kw_only=True)
class Shard:
    """One finished shard.

    Attributes:
        shard: its number; it holds source rows [first_source_row, first_source_row + source_rows).
        rows: rows written; less than the source's where pictures are unreadable, more with a row a
            caption.
        errors: pictures that could not be read.
        files: by path in the store, the size in bytes and the SHA-256 of each of its files.
    """

    shard: int
    first_source_row: int
    source_rows: int
    rows: int
    errors: int
    files: dict[str, dict[str, int | str]]

    def is_whole(self, folder: Path) -> bool:
        """Whether every file is there in its full size."""
        try:
            return all(
                (folder / name).stat().st_size == record["bytes"]
                for name, record in self.files.items()
            )
        except OSError:
            return False


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """What a store holds and how it was made, or the plan of one in the making.

    Attributes:
        complete: every shard is written.
        rows: rows of the store; source_rows: images of the source; errors: unreadable ones.
        dim: values a row, of `dtype` (fp16 or fp32); `normalized` rows have unit norm before
            rounding.
        rows_kind: `images` (one row an image) or `pairs` (one row a caption).
        images, texts: whether there are image and caption embeddings.
        shard_rows: source rows a shard; batch_size: rows a forward pass; text_length: tokens a
            caption.
        precision, device, threads: what the towers computed in, where, with how many CPU threads a
            process. With these, the grid of shards and the batch size, a rerun gives the same
            bytes.
        model: the variant; checkpoint, checkpoint_sha256: the file and its hash.
        source, source_fingerprint: the data's name and a hash over its paths, captions and columns.
        shards: the finished shards in order.
    """

    complete: bool = False
    rows: int = 0
    source_rows: int = 0
    errors: int = 0
    dim: int = 0
    dtype: str = "fp16"
    normalized: bool = True
    rows_kind: str = "images"
    images: bool = True
    texts: bool = True
    shard_rows: int = 0
    batch_size: int = 0
    text_length: int = 0
    precision: str = "fp32"
    device: str = "cpu"
    threads: int = 0
    model: str = ""
    checkpoint: str = ""
    checkpoint_sha256: str = ""
    source: str = ""
    source_fingerprint: str = ""
    shards: tuple[Shard, ...] = ()

    @property
    def numpy_dtype(self) -> type[np.float16 | np.float32]:
        """What the `.npy` files hold."""
        return np.float16 if self.dtype == "fp16" else np.float32

    @property
    def num_shards(self) -> int:
        """Shards of the finished store."""
        return -(-self.source_rows // self.shard_rows)

    def shard_range(self, shard: int) -> range:
        """The source rows of a shard."""
        first = shard * self.shard_rows
        return range(first, min(first + self.shard_rows, self.source_rows))

    def path(self, kind: str, shard: int) -> str:
        """A shard's file in the store, for example `img_emb/img_emb_0000.npy`."""
        digits = max(4, len(str(self.num_shards - 1)))
        suffix = {METADATA: "parquet", DONE: "json"}.get(kind, "npy")
        return f"{kind}/{kind}_{shard:0{digits}d}.{suffix}"

    def is_whole(self, folder: Path) -> bool:
        """Whether every file of every shard is there in its full size."""
        return all(shard.is_whole(folder) for shard in self.shards)

    def differences(self, other: Manifest) -> list[str]:
        """In what `other` is another encoding than this one, in the user's words."""
        return [
            f"{words} is {getattr(self, name)} there and {getattr(other, name)} here"
            for name, words in _IDENTITY.items()
            if getattr(self, name) != getattr(other, name)
        ]

    def write(self, folder: Path) -> None:
        """Write `manifest.json`, whole or not at all."""
        plain = {"format": FORMAT, "version": VERSION, **dataclasses.asdict(self)}
        write_json(folder / MANIFEST, plain)

    @classmethod
    def read(cls, folder: Path) -> Manifest:
        """The manifest of a folder.

        Raises:
            ConfigError: it is not there, not ours, or of a newer version.
        """
        path = folder / MANIFEST
        try:
            plain: dict[str, Any] = json.loads(path.read_text())
            named, version = plain.pop("format"), plain.pop("version")
        except FileNotFoundError:
            raise ConfigError(f"{folder} is not an embedding store: it has no {MANIFEST}") from None
        except (OSError, ValueError, LookupError, AttributeError, TypeError) as error:
            raise ConfigError(f"{path} is not the manifest of an embedding store") from error
        if named != FORMAT:
            raise ConfigError(f"{path} is not the manifest of an embedding store")
        if version != VERSION:
            raise ConfigError(
                f"{folder} is a store of version {version}, and this twotower reads version "
                f"{VERSION}; encode it again"
            )
        try:
            shards = tuple(Shard(**shard) for shard in plain.pop("shards"))
            return cls(**plain, shards=shards)
        except (LookupError, TypeError) as error:
            raise ConfigError(f"{path} lacks or has too many entries; encode again") from error


def write_json(path: Path, plain: Any) -> None:
    """Write JSON, whole or not at all."""
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(plain, indent=1) + "\n")
