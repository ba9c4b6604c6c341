"""Reading an embedding store: memory-mapped vectors, and metadata a few rows at a time."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from twotower.checkpoint.native import file_sha256
from twotower.embedding.alive import Mask, alive_rows, deleted_ids
from twotower.embedding.layout import (
    ERRORS,
    IMAGES,
    METADATA,
    TEXTS,
    FloatRows,
    IntArray,
    Manifest,
)
from twotower.settings import ConfigError

log = logging.getLogger(__name__)

Item = TypeVar("Item")


class EmbeddingStore:
    """A finished embedding store: image and caption vectors, and the metadata of their rows.

    Row i of the image vectors, of the caption vectors and of the metadata belong together. Rows are
    asked for by `row_id`, which is stable; positions are only those in the shards.
    """

    def __init__(self, folder: Path, manifest: Manifest) -> None:
        self.folder = folder
        self.manifest = manifest
        self._cached_group = lru_cache(maxsize=64)(self._group)

    @classmethod
    def open(cls, folder: Path) -> EmbeddingStore:
        """Open a store, or a folder of the older layout's shards; no row is read.

        Raises:
            ConfigError: the folder is missing, is no store, is not finished or lacks a file.
        """
        from twotower.embedding.legacy import LegacyStore, is_legacy

        if not folder.is_dir():
            raise ConfigError(
                f"no embedding store at {folder}; make one with `twotower encode ...`, or give "
                "store=..."
            )
        if is_legacy(folder):
            return LegacyStore.open(folder)
        manifest = Manifest.read(folder)
        if not manifest.complete:
            raise ConfigError(
                f"the store {folder} is not finished; run the same `twotower encode` again, which "
                "keeps what is done"
            )
        for shard in manifest.shards:
            if not shard.is_whole(folder):
                raise ConfigError(
                    f"the store {folder} is damaged: a file of shard {shard.shard} is missing or "
                    f"cut; {manifest.repair}"
                )
        return cls(folder, manifest)

    def __len__(self) -> int:
        return self.manifest.rows

    @property
    def has_images(self) -> bool:
        """Whether there are image vectors."""
        return self.manifest.images

    @property
    def has_texts(self) -> bool:
        """Whether there are caption vectors."""
        return self.manifest.texts

    def image_shards(self) -> list[FloatRows]:
        """The image vectors, a read-only memory map (n, D) a shard.

        Raises:
            ConfigError: the store has none.
        """
        if not self.has_images:
            raise ConfigError(
                f"the store {self.folder} has no image embeddings; encode with encode.images=true"
            )
        return self._image_shards

    def text_shards(self) -> list[FloatRows]:
        """The caption vectors, a read-only memory map (n, D) a shard.

        Raises:
            ConfigError: the store has none.
        """
        if not self.has_texts:
            raise ConfigError(
                f"the store {self.folder} has no caption embeddings; encode a source with "
                "captions, with encode.texts=true"
            )
        return self._text_shards

    @cached_property
    def _image_shards(self) -> list[FloatRows]:
        return self._maps(IMAGES)

    @cached_property
    def _text_shards(self) -> list[FloatRows]:
        return self._maps(TEXTS)

    def _maps(self, kind: str) -> list[FloatRows]:
        """Memory maps; of a shard with dead rows a copy of the others, until it is compacted."""
        return [self.shard_rows(kind, place) for place in range(len(self.manifest.shards))]

    def shard_rows(self, kind: str, place: int) -> FloatRows:
        """The vectors of one kind (`img_emb`) of a shard, by its place, as `image_shards` has them.

        Nothing else is mapped or copied: for those who go through a store once.
        """
        path = self.folder / self.manifest.shards[place].file(kind)
        rows: FloatRows = np.load(path, mmap_mode="r")
        return rows if self._alive is None or self._alive[place].all() else rows[self._alive[place]]

    @cached_property
    def _alive(self) -> list[Mask] | None:
        """Which rows of each shard's files count; None if all of them do."""
        if not self.manifest.has_dead_rows:  # then the ids need not be read
            return None
        return alive_rows(self.folder, self.manifest, self._stored_ids)

    def deleted(self) -> IntArray:
        """The ids of rows that updates have deleted, in the order in which they did.

        Raises:
            ConfigError: the list is missing or cut.
        """
        return deleted_ids(self.folder, self.manifest)

    def schema(self) -> pa.Schema:
        """The columns of the metadata, those of all shards."""
        schemas = [
            pq.read_schema(self._metadata_path(place)).remove_metadata()
            for place in range(len(self.manifest.shards))
        ]
        return pa.unify_schemas(schemas, promote_options="permissive")

    def table(self, place: int, columns: list[str] | None = None) -> pa.Table:
        """The metadata of a whole shard, by its place; its rows are those of `image_shards`.

        Args:
            columns: those to read of the ones that the shard has; by default all.
        """
        table = pq.read_table(self._metadata_path(place), columns=columns)
        return table if self._alive is None else table.filter(pa.array(self._alive[place]))

    def image_rows(self, row_ids: Sequence[int] | IntArray) -> FloatRows:
        """The image vectors (N, D) of these rows, in the order asked.

        Raises:
            KeyError: a row id that the store does not have.
        """
        return self._gather(self.image_shards(), row_ids)

    def text_rows(self, row_ids: Sequence[int] | IntArray) -> FloatRows:
        """The caption vectors (N, D) of these rows, in the order asked.

        Raises:
            KeyError: a row id that the store does not have.
        """
        return self._gather(self.text_shards(), row_ids)

    def _gather(self, shards: list[FloatRows], row_ids: Sequence[int] | IntArray) -> FloatRows:
        rows = np.empty((len(row_ids), self.manifest.dim), shards[0].dtype)
        places, inside = self.locate(row_ids)
        for place in np.unique(places):
            here = places == place
            rows[here] = shards[place][inside[here]]
        return rows

    def row_ids(self) -> IntArray:
        """The id of every row, in the order of the shards: (N,) int64."""
        return self._row_ids

    @cached_property
    def _row_ids(self) -> IntArray:
        ids = self._stored_ids
        return ids if self._alive is None else ids[np.concatenate(self._alive)]

    @cached_property
    def _stored_ids(self) -> IntArray:
        """The ids of all rows of the files, dead ones too."""
        parts = [np.empty(0, np.int64)]
        for shard in self.manifest.shards:
            path = self.folder / shard.file(METADATA)
            parts.append(pq.read_table(path, columns=["row_id"])["row_id"].to_numpy())
        return np.concatenate(parts)

    @cached_property
    def _ascending(self) -> tuple[IntArray, IntArray]:
        """The row ids in ascending order, and the position of each."""
        order = np.argsort(self._row_ids, kind="stable")
        return self._row_ids[order], order

    @cached_property
    def _shard_starts(self) -> IntArray:
        counts = [shard.rows for shard in self.manifest.shards]
        if self._alive is not None:
            counts = [int(alive.sum()) for alive in self._alive]
        return np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)

    def locate(self, row_ids: Sequence[int] | IntArray) -> tuple[IntArray, IntArray]:
        """In which of the shards each row is, and where in it."""
        wanted = np.asarray(row_ids, np.int64)
        ids, order = self._ascending
        found = np.searchsorted(ids, wanted)
        found_ids = ids[np.minimum(found, len(ids) - 1)] if len(ids) else np.full_like(wanted, -1)
        unknown = wanted[found_ids != wanted]
        if len(unknown):
            raise KeyError(f"the store {self.folder} has no row {unknown[0]}")
        positions = order[found]
        places = np.searchsorted(self._shard_starts, positions, side="right") - 1
        return places, positions - self._shard_starts[places]

    def metadata(self, row_ids: Sequence[int] | IntArray) -> list[dict[str, Any]]:
        """The metadata of these rows, in the order asked; only their Parquet groups are read.

        Each has image_path, caption, captions, row_id, source_row, image_id, split and the source's
        columns.

        Raises:
            KeyError: a row id that the store does not have.
        """
        places, inside = self.locate(row_ids)
        return [self._row(int(place), int(row)) for place, row in zip(places, inside, strict=True)]

    def _row(self, place: int, row: int) -> dict[str, Any]:
        starts = self._group_starts(place)
        if self._alive is not None:
            row = int(np.flatnonzero(self._alive[place])[row])
        group = int(np.searchsorted(starts, row, side="right")) - 1
        table = self._cached_group(place, group)
        found: dict[str, Any] = table.slice(row - int(starts[group]), 1).to_pylist()[0]
        return found

    def _metadata_path(self, place: int) -> Path:
        return self.folder / self.manifest.shards[place].file(METADATA)

    def _group_starts(self, place: int) -> IntArray:
        """The first row of each Parquet group of a shard."""
        if place not in self._starts:
            footer = pq.read_metadata(self._metadata_path(place))
            counts = [footer.row_group(group).num_rows for group in range(footer.num_row_groups)]
            self._starts[place] = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
        return self._starts[place]

    @cached_property
    def _starts(self) -> dict[int, IntArray]:
        return {}

    def _group(self, place: int, group: int) -> pa.Table:
        return pq.ParquetFile(self._metadata_path(place)).read_row_group(group)

    def errors(self) -> list[dict[str, Any]]:
        """The inputs that could not be read: source_row, path and reason of each."""
        found: list[dict[str, Any]] = pq.read_table(self.folder / ERRORS).to_pylist()
        return found

    def check_checkpoint(self, checkpoint: Path) -> None:
        """Refuse a checkpoint whose vectors do not live in this store's space.

        Raises:
            ConfigError: the store was made by a checkpoint with another SHA-256.
        """
        made_by, given = self.manifest.checkpoint_sha256, file_sha256(checkpoint)
        if made_by != given:
            raise ConfigError(
                f"the store {self.folder} was made by the checkpoint {made_by[:16]} "
                f"({self.manifest.checkpoint}), and {checkpoint} is {given[:16]}; encode again "
                "with this checkpoint, or give the one that made the store"
            )
