"""What was done to one shard of an index, on disk, so that it can be done again elsewhere.

A journal is a folder with a file an operation, `000000.json`, written by one process and read by
any. Rows of a store are not copied: an operation names their place in the store's file.
"""

from __future__ import annotations

import hashlib
import itertools
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from twotower.checkpoint.atomic import replacing
from twotower.settings import ConfigError

Plain = dict[str, Any]
Array = npt.NDArray[Any]

START = ""  # the fingerprint of a shard to which nothing was done


@dataclass(frozen=True)
class Operation:
    """One change of a shard: `read` a file, `add` rows or `delete` ids.

    Attributes:
        before: the fingerprint of the shard that it changes.
        rows: how many the shard has afterwards.
        named: places of arrays, or of the file that is read.
    """

    kind: str
    before: str
    rows: int
    named: dict[str, Plain]
    normalized: bool = False

    @property
    def after(self) -> str:
        """The fingerprint of the changed shard."""
        return hashlib.sha256(json.dumps(vars(self), sort_keys=True).encode()).hexdigest()


class Journal:
    """The operations of a shard, in order."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def operation(self, number: int) -> Operation | None:
        """An operation by its number; None if it is not there.

        Raises:
            ConfigError: it is damaged.
        """
        try:
            plain = json.loads(self._file(number).read_text())
            return Operation(**plain)
        except FileNotFoundError:
            return None
        except (OSError, ValueError, TypeError) as error:
            raise ConfigError(f"{self._file(number)} is damaged; build the index again") from error

    def count(self) -> int:
        """How many operations there are.

        A name that is not there is not looked for: a network file system would remember that.
        """
        names = {path.name for path in self.folder.iterdir()}
        return next(count for count in itertools.count() if f"{count:06d}.json" not in names)

    def write(self, number: int, operation: Operation) -> None:
        """Write an operation.

        Raises:
            ConfigError: the folder cannot be written.
        """
        with replacing(self._file(number)) as temporary:
            temporary.write_text(json.dumps(vars(operation)))

    def drop(self, number: int) -> None:
        """Undo the writing of the newest operation."""
        self._file(number).unlink(missing_ok=True)
        for file in self.folder.glob(f"{number:06d}.*.npy"):
            file.unlink()

    def first(self, count: int) -> int:
        """The number of the operation from which a new reader of `count` of them starts."""
        for number in range(count - 1, 0, -1):
            found = self.operation(number)
            if found is not None and found.kind == "read":
                return number
        return 0

    def place(self, number: int, name: str, array: Array) -> Plain:
        """Where an array is: in the file that it is mapped from, or in one that is written here.

        Raises:
            ConfigError: the folder cannot be written.
        """
        mapped = _mapped_place(array)
        if mapped is not None:
            return mapped
        with replacing(self.folder / f"{number:06d}.{name}.npy") as temporary:
            with temporary.open("wb") as file:
                np.save(file, array, allow_pickle=False)
            digest = hashlib.sha256(np.ascontiguousarray(array).data).hexdigest()
        return {"file": f"{number:06d}.{name}.npy", "digest": digest}

    def array(self, place: Plain) -> Array:
        """The array that `place` named, memory-mapped if it was.

        Raises:
            ConfigError: its file is not there any more, or another.
        """
        if "offset" not in place:
            try:
                return np.load(self.folder / place["file"], allow_pickle=False)  # type: ignore[no-any-return]
            except (OSError, ValueError) as error:
                raise ConfigError(f"{place['file']} of a shard is lost: {error}") from error
        shape = tuple(place["shape"])
        return np.memmap(unchanged(place), place["dtype"], "r", place["offset"], shape)

    def _file(self, number: int) -> Path:
        return self.folder / f"{number:06d}.json"


def file_place(file: Path) -> Plain:
    """A file as it is now."""
    about = file.stat()
    return {"file": str(file.absolute()), "size": about.st_size, "changed": about.st_mtime_ns}


def unchanged(place: Plain) -> Path:
    """The file that `file_place` named.

    Raises:
        ConfigError: it is not there any more, or another.
    """
    file = Path(place["file"])
    try:
        now = file_place(file)
    except OSError as error:
        raise ConfigError(
            f"a shard is made from {file}, which this node does not see: {error.strerror}"
        ) from error
    if any(now[key] != place[key] for key in ("size", "changed")):
        raise ConfigError(f"a shard is made from {file}, which has changed; build the index again")
    return file


def _mapped_place(array: Array) -> Plain | None:
    """The part of a file that a C-contiguous array is mapped from, read-only."""
    root: Any = array
    while isinstance(root.base, np.memmap):
        root = root.base
    mapped = isinstance(root, np.memmap) and root.filename is not None and root.mode == "r"
    if not mapped or not array.flags.c_contiguous or not array.size:
        return None
    start = array.__array_interface__["data"][0] - root.__array_interface__["data"][0]
    return {
        **file_place(Path(str(root.filename))),
        "offset": int(root.offset + start),
        "dtype": array.dtype.str,
        "shape": list(array.shape),
    }
