"""Where a picture lies: a file, or a piece of a larger one, which a name in path's clothes says.

`00012.tar#1536+20480/000120007.jpg` is the 20,480 bytes from byte 1,536 of 00012.tar on, called
000120007.jpg. Such a name is all that it takes to read the picture: it stands in a table's column
`filepath` and in the metadata of a store like any path, and can be joined to a folder like one.
"""

from __future__ import annotations

import os
import re
from pathlib import Path, PurePosixPath
from typing import NamedTuple

import pyarrow as pa
import pyarrow.compute as pc

_PIECE = re.compile(r"(.+)#(\d+)\+(\d+)/[^/]+", re.DOTALL)


class PlaceState(NamedTuple):
    """What tells that a picture has changed: its size in bytes, and its file's time in ns."""

    size: int
    mtime_ns: int


def piece_name(file: str, offset: int, size: int, name: str) -> str:
    """The name of `size` bytes of a file; `name` is what to call them, a path or empty."""
    return f"{file}#{offset}+{size}/{last_name(name)}"


def last_name(name: str) -> str:
    """The last part of a path as a name that no path is disturbed by."""
    last = PurePosixPath(name).name.replace("\0", "")
    return "picture" if last in ("", "..") else last


def piece_names(
    file: str, offsets: pa.ChunkedArray, sizes: pa.ChunkedArray, names: pa.ChunkedArray
) -> pa.ChunkedArray:
    """`piece_name` of many pieces of one file at once; `names` are already last parts."""
    text = pa.large_string()
    mark, plus, slash = (pa.scalar(sign, text) for sign in (f"{file}#", "+", "/"))
    parts = (mark, offsets.cast(text), plus, sizes.cast(text), slash, names.cast(text))
    return pc.binary_join_element_wise(*parts, pa.scalar("", text))


def file_of(place: str | Path) -> Path:
    """The file that has to be there: the place itself, or what it is a piece of."""
    found = _PIECE.fullmatch(os.fspath(place))
    return Path(found[1] if found else place)


def read_place(place: str | Path) -> tuple[bytes, int]:
    """The bytes of a picture, and when their file was changed (ns).

    Raises:
        OSError: the file cannot be read, or ends too soon.
    """
    found = _PIECE.fullmatch(os.fspath(place))
    with open(found[1] if found else place, "rb", buffering=0) as file:
        state = os.fstat(file.fileno())
        if found is None:
            return file.read(), state.st_mtime_ns
        first, size = int(found[2]), int(found[3])
        # Asked before reading, which would take as much memory as the name says.
        data = os.pread(file.fileno(), size, first) if first + size <= state.st_size else b""
    if len(data) < size:
        raise OSError(f"{Path(found[1]).name} ends within the picture")
    return data, state.st_mtime_ns


def read_bytes(place: str | Path) -> bytes:
    """The bytes of a picture.

    Raises:
        OSError: as `read_place`.
    """
    return read_place(place)[0]


def state_of(place: str | Path) -> PlaceState:
    """The state of a picture, without reading it.

    Raises:
        OSError: there is no such file.
    """
    found = _PIECE.fullmatch(os.fspath(place))
    state = os.stat(found[1] if found else place)
    return PlaceState(int(found[3]) if found else state.st_size, state.st_mtime_ns)
