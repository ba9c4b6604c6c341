"""The files of an embedding store: their names, and the manifest that says what they hold."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from twotower.checkpoint.atomic import replacing
from twotower.settings import ConfigError

FORMAT = "twotower embedding store"
VERSION = 2
READABLE = (1, 2)  # version 1 had no fingerprint and no updates

MANIFEST = "manifest.json"
ERRORS = "errors.parquet"
IMAGES, TEXTS, METADATA = "img_emb", "text_emb", "metadata"
# One file a finished shard while a store is being made; the manifest takes them over.
DONE = "shards"
# What each image of the source was when it was encoded; in the making, one such file a shard.
SOURCE, STATES = "source.parquet", "states"
DELETED = "deleted.npy"

ERROR_SCHEMA = pa.schema(
    [("source_row", pa.int64()), ("path", pa.string()), ("reason", pa.string())]
)

STATE_SCHEMA = pa.schema(
    [
        ("image_id", pa.large_string()),
        ("row_id", pa.int64()),  # of the image's first row
        ("rows", pa.int64()),  # if it can be read
        ("size", pa.int64()),
        ("mtime_ns", pa.int64()),
        ("sha256", pa.string()),
        ("about", pa.string()),  # a hash of its captions and columns
        ("reason", pa.string()),  # why it cannot be read; empty if it can
    ]
)

FloatRows = npt.NDArray[np.float16 | np.float32]
FloatArray = npt.NDArray[np.float32]
IntArray = npt.NDArray[np.int64]

# What two vectors must share for their product to mean anything, in the user's words.
SPACE = {
    "checkpoint_sha256": "the checkpoint (SHA-256)",
    "preprocessing": "the preparation of pictures",
    "tokenizer": "the tokenizer",
    "text_length": "the tokens of a caption",
    "normalized": "unit norm",
    "model": "the variant",
    "config": "the config of the model",
}
# What the rows of one store must share beyond that.
FINGERPRINT = {**SPACE, "dtype": "encode.dtype", "precision": "encode.precision"}


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

    def file(self, kind: str) -> str:
        """Its file of one kind (`img_emb`), a path in the store."""
        return next(name for name in self.files if name.startswith(f"{kind}/"))

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
        images, texts: whether there are image and caption embeddings; columns: whether the
            metadata has the source's own columns.
        shard_rows: source rows a shard; batch_size: rows a forward pass; text_length: tokens a
            caption.
        precision, device, threads: what the towers computed in, where, with how many CPU threads a
            process; compiled: whether by torch.compile, which changes the last digits. With these,
            the grid of shards and the batch size, a rerun gives the same bytes.
        model, config: the variant and its section; checkpoint, checkpoint_sha256: the file and its
            hash; preprocessing, tokenizer: how pictures and captions become the towers' inputs.
        source, source_fingerprint: the data's name and a hash over its paths, captions and columns.
        state: the file that says what each image was when it was encoded; empty if unknown.
        next_row_id: the first id that no row has had. updates: how often the store was updated;
            beyond 0, rows no longer follow the grid. deleted: so many ids of `deleted.npy` count.
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
    columns: bool = True
    shard_rows: int = 0
    batch_size: int = 0
    text_length: int = 0
    precision: str = "fp32"
    compiled: bool = False
    device: str = "cpu"
    threads: int = 0
    model: str = ""
    config: dict[str, Any] = dataclasses.field(default_factory=dict)
    preprocessing: str = ""
    tokenizer: str = ""
    checkpoint: str = ""
    checkpoint_sha256: str = ""
    source: str = ""
    source_fingerprint: str = ""
    state: str = ""
    next_row_id: int = 0
    updates: int = 0
    deleted: int = 0
    shards: tuple[Shard, ...] = ()

    @property
    def numpy_dtype(self) -> type[np.float16 | np.float32]:
        """What the `.npy` files hold."""
        return np.float16 if self.dtype == "fp16" else np.float32

    @property
    def num_shards(self) -> int:
        """Shards of the finished store."""
        return -(-self.source_rows // self.shard_rows)

    @property
    def has_dead_rows(self) -> bool:
        """Whether files hold rows that an update has deleted or replaced."""
        return self.rows < sum(shard.rows for shard in self.shards)

    @property
    def repair(self) -> str:
        """What the user can do about files that are missing or damaged."""
        if not self.state:
            return "merge its parts again, or encode anew with encode.overwrite=true"
        if self.updates:  # its rows no longer follow the grid
            return "encode anew with encode.overwrite=true"
        return "run the same `twotower encode` again, which makes them anew"

    def shard_range(self, shard: int) -> range:
        """The source rows of a shard."""
        first = shard * self.shard_rows
        return range(first, min(first + self.shard_rows, self.source_rows))

    def path(self, kind: str, shard: int) -> str:
        """A shard's file in the store, for example `img_emb/img_emb_0000.npy`."""
        digits = max(4, len(str(self.num_shards - 1)))
        suffix = {METADATA: "parquet", STATES: "parquet", DONE: "json"}.get(kind, "npy")
        return f"{kind}/{kind}_{shard:0{digits}d}.{suffix}"

    def is_whole(self, folder: Path) -> bool:
        """Whether every file of every shard is there in its full size."""
        return all(shard.is_whole(folder) for shard in self.shards)

    @property
    def space(self) -> str:
        """SHA-256 of all that two vectors must share for their product to mean anything."""
        return self._hash(SPACE)

    @property
    def fingerprint(self) -> str:
        """SHA-256 of all that the rows of one store share: the space, and the precision."""
        return self._hash(FINGERPRINT)

    def job(self, *also: str) -> str:
        """A short name that encoders have in common who do the same by this plan."""
        about = {**dataclasses.asdict(self), "source": "", "checkpoint": "", "also": also}
        return hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()[:16]

    def _hash(self, names: Iterable[str]) -> str:
        about = {name: getattr(self, name) for name in names}
        return hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()

    def write(self, folder: Path) -> None:
        """Write `manifest.json`, whole or not at all."""
        about = {"format": FORMAT, "version": VERSION, "fingerprint": self.fingerprint}
        write_json(folder / MANIFEST, {**about, **dataclasses.asdict(self)})

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
        if version not in READABLE:
            raise ConfigError(
                f"{folder} is a store of version {version}, and this twotower reads version "
                f"{VERSION}; encode it again"
            )
        try:
            fingerprint = plain.pop("fingerprint", "")
            shards = tuple(Shard(**shard) for shard in plain.pop("shards"))
            manifest = cls(**plain, shards=shards)
        except (LookupError, TypeError) as error:
            raise ConfigError(f"{path} lacks or has too many entries; encode again") from error
        if fingerprint and fingerprint != manifest.fingerprint:
            raise ConfigError(
                f"{path} has the fingerprint {fingerprint[:16]} and entries of "
                f"{manifest.fingerprint[:16]}: it was changed after it was written; encode again"
            )
        return manifest


def write_json(path: Path, plain: Any) -> None:
    """Write JSON, whole or not at all."""
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(plain, indent=1) + "\n")
