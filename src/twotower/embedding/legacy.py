"""The older layout, read and written: a torch file a rank and batch, with paths and vectors."""

from __future__ import annotations

import ast
import hashlib
import logging
import pickle
import re
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
import torch.nn.functional as F

from twotower.checkpoint.atomic import is_taken, replacing
from twotower.embedding.layout import FloatArray, FloatRows, IntArray, Manifest
from twotower.embedding.store import EmbeddingStore
from twotower.settings import ConfigError

log = logging.getLogger(__name__)

_NAME = re.compile(r"(\d+)-(\d+)-(\d+)\.(?:ckpt|pt)")


def _shards(folder: Path) -> list[Path]:
    """The files `<rank>-<step>-<batch>.ckpt` or `.pt` in the order of those numbers."""
    found = []
    for path in folder.iterdir():
        match = _NAME.fullmatch(path.name)
        if match:
            found.append((tuple(int(number) for number in match.groups()), path))
    return [path for _, path in sorted(found)]


def is_legacy(folder: Path) -> bool:
    """Whether a folder holds shards of the older layout and no manifest."""
    return not (folder / "manifest.json").exists() and bool(_shards(folder))


def read_legacy_shard(path: Path) -> tuple[list[str], FloatArray]:
    """The paths and the vectors (n, D) float32, of unit norm, of one file; no code in it is run.

    Raises:
        ConfigError: it is not such a file, or paths and vectors are not equally many.
    """
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
        paths, rows = content["path"], content["emb"]
        # Old writers stored `str(list_of_paths)`.
        paths = ast.literal_eval(paths) if isinstance(paths, str) else list(paths)
        rows = F.normalize(torch.as_tensor(rows).float(), dim=-1)
    except (OSError, pickle.UnpicklingError, RuntimeError, LookupError, TypeError) as error:
        raise ConfigError(
            f"{path} is not an embedding shard: a dict of path and emb is expected"
        ) from error
    except (ValueError, SyntaxError) as error:
        raise ConfigError(f"{path}: its paths are not a list") from error
    if rows.ndim != 2 or len(rows) != len(paths):
        raise ConfigError(
            f"{path} has {len(paths)} paths and vectors of shape {tuple(rows.shape)}; they must "
            "go together"
        )
    return [str(name) for name in paths], rows.numpy()


def _fingerprint(paths: list[str], rows: FloatArray) -> str:
    """SHA-256 of the paths and the vectors, which tells one such folder from another."""
    sha256 = hashlib.sha256("\0".join(paths).encode(errors="surrogatepass"))
    sha256.update(np.ascontiguousarray(rows).data)
    return sha256.hexdigest()


def check_legacy_folder(folder: Path) -> None:
    """Refuse a folder that a copy of a store cannot be written into.

    Raises:
        ConfigError: it is a file, or not empty.
    """
    if is_taken(folder):
        raise ConfigError(f"{folder} is not empty; give encode.legacy_output an empty folder")


def write_legacy(store: EmbeddingStore, folder: Path, rows_a_file: int = 1000) -> int:
    """Write a store's image vectors and paths in the older layout, as `.pt` files of a few rows.

    Returns:
        How many files.

    Raises:
        ConfigError: the store has no image vectors, the folder is not empty or cannot be written.
    """
    shards = store.image_shards()
    check_legacy_folder(folder)
    count = 0
    for place, rows in enumerate(shards):
        paths = store.table(place)["image_path"].to_pylist()
        for first in range(0, len(rows), rows_a_file):
            part = slice(first, first + rows_a_file)
            emb = torch.from_numpy(np.array(rows[part], np.float32))
            with replacing(folder / f"0-{count:03d}-{count}.pt") as temporary:
                torch.save({"path": paths[part], "emb": emb}, temporary)
            count += 1
    return count


class LegacyStore(EmbeddingStore):
    """A folder of the older layout, read into memory: image vectors and paths, nothing else.

    Rows stand in the order of the files; of a path that comes twice (the older exporter padded its
    ranks with copies) the first is kept. `row_id` counts the rows. Which checkpoint made them is
    not known.
    """

    def __init__(self, folder: Path, paths: list[str], rows: FloatArray) -> None:
        manifest = Manifest(
            complete=True,
            rows=len(paths),
            source_rows=len(paths),
            dim=rows.shape[1],
            dtype="fp32",
            texts=False,
            shard_rows=len(paths),
            source=str(folder),
            source_fingerprint=_fingerprint(paths, rows),
        )
        super().__init__(folder, manifest)
        self._paths = paths
        self._rows = rows

    @classmethod
    def open(cls, folder: Path) -> LegacyStore:
        """Read every shard of a folder.

        Raises:
            ConfigError: a shard cannot be read, or has another dimension than the first.
        """
        first_place: dict[str, int] = {}
        parts: list[FloatArray] = []
        count = 0
        for shard in _shards(folder):
            paths, rows = read_legacy_shard(shard)
            if parts and rows.shape[1] != parts[0].shape[1]:
                raise ConfigError(
                    f"{shard} has vectors of dimension {rows.shape[1]}, the shards before it of "
                    f"{parts[0].shape[1]}"
                )
            for place, path in enumerate(paths):
                first_place.setdefault(path, count + place)
            parts.append(rows)
            count += len(paths)
        if len(first_place) < count:
            log.warning("%s: left out %d repeated paths", folder, count - len(first_place))
        return cls(folder, list(first_place), np.concatenate(parts)[list(first_place.values())])

    @cached_property
    def _image_shards(self) -> list[FloatRows]:
        return [self._rows]

    @cached_property
    def _row_ids(self) -> IntArray:
        return np.arange(len(self), dtype=np.int64)

    @cached_property
    def _shard_starts(self) -> IntArray:
        return np.array([0, len(self)], np.int64)

    def _group_starts(self, place: int) -> IntArray:
        return self._shard_starts

    def _group(self, place: int, group: int) -> pa.Table:
        count = len(self._paths)
        return pa.table(
            {
                "image_path": self._paths,
                "caption": [""] * count,
                "captions": pa.array([[]] * count, pa.list_(pa.string())),
                "row_id": self._row_ids,
                "source_row": self._row_ids,
                "image_id": self._paths,
                "split": [""] * count,
            }
        )

    def schema(self) -> pa.Schema:
        """The columns that every store has."""
        return self._group(0, 0).schema

    def table(self, place: int, columns: list[str] | None = None) -> pa.Table:
        """The paths as metadata; see `EmbeddingStore.table`."""
        table = self._group(place, 0)
        return table if columns is None else table.select(columns)

    def errors(self) -> list[dict[str, Any]]:
        """Nothing: the older layout kept no list."""
        return []

    def check_checkpoint(self, checkpoint: Path) -> None:
        """Warn that nothing can be checked: the older layout names no checkpoint."""
        log.warning(
            "%s does not say which checkpoint made it; if that is not %s, the results mean nothing",
            self.folder,
            checkpoint,
        )
