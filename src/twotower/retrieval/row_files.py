"""Rows of an index that lie outside of it: in the files of a store, which a saved index names."""

from __future__ import annotations

import dataclasses
import mmap
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from twotower.retrieval.index import AnyFloatArray
from twotower.settings import ConfigError


@dataclass(frozen=True)
class RowFile:
    """Where rows lie, and what the file was like when they were taken into the index.

    Attributes:
        offset: of the first row, in bytes; shape: (rows, dim); kind: `float16` or `float32`.
        size, mtime_ns: of the whole file.
    """

    path: str
    offset: int
    shape: tuple[int, int]
    kind: str
    size: int
    mtime_ns: int

    @classmethod
    def of(cls, rows: AnyFloatArray) -> RowFile | None:
        """The file that rows (n, dim) are mapped from, read-only; None if they are in memory.

        None, too, where another file has that name by now: the map goes on showing the old one.
        """
        mapped = rows
        while isinstance(mapped.base, np.memmap):  # a slice of a map has the offset of the whole
            mapped = mapped.base
        if not isinstance(mapped, np.memmap) or mapped.filename is None or mapped.mode != "r":
            return None
        try:
            stat = os.stat(mapped.filename)
            made = cls(
                path=os.path.abspath(mapped.filename),
                offset=mapped.offset + rows.ctypes.data - mapped.ctypes.data,
                shape=(rows.shape[0], rows.shape[1]),
                kind=rows.dtype.name,
                size=stat.st_size,
                mtime_ns=stat.st_mtime_ns,
            )
            there, ends = made.rows(), [0, -1]
        except (OSError, ConfigError, ValueError):  # it is gone, or shorter
            return None
        return made if np.array_equal(rows[ends], there[ends]) else None

    def rows(self, *, at_random: bool = False) -> AnyFloatArray:
        """The rows, memory-mapped.

        Args:
            at_random: a few are read here and there, so what lies around them is not to be read
                ahead: a row would cost megabytes.

        Raises:
            ConfigError: the file is not there, or is no longer the same.
        """
        try:
            stat = os.stat(self.path)
            if (stat.st_size, stat.st_mtime_ns) != (self.size, self.mtime_ns):
                raise ConfigError(
                    f"the index takes its rows from {self.path}, which has changed since; build it "
                    "again"
                )
            rows = np.memmap(self.path, self.kind, "r", self.offset, self.shape)
        except OSError as error:
            raise ConfigError(
                f"the index takes its rows from {self.path}, which cannot be read "
                f"({error.strerror}); put the store back, or build it again"
            ) from error
        mapping: object = rows.base
        if at_random and isinstance(mapping, mmap.mmap) and hasattr(mmap, "MADV_RANDOM"):
            mapping.madvise(mmap.MADV_RANDOM)
        return rows

    def to_plain(self, folder: Path) -> dict[str, Any]:
        """Its entries, the path as it is seen from a folder."""
        here = os.path.relpath(self.path, os.path.abspath(folder))
        return {**dataclasses.asdict(self), "from_here": here}

    @classmethod
    def of_plain(cls, plain: Mapping[str, Any], folder: Path) -> RowFile:
        """What `to_plain` gave; store and index may have been moved together, or neither."""
        entries = dict(plain)
        here = os.path.normpath(os.path.join(os.path.abspath(folder), entries.pop("from_here")))
        if os.path.exists(here):
            entries["path"] = here
        return cls(**{**entries, "shape": tuple(entries["shape"])})
