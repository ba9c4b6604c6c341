"""Arrays in a safetensors file, written part by part and read as memory maps.

`safetensors` itself would hold all bytes in memory at once to write them; an index may be larger.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]

TYPES = {"F64": np.float64, "F32": np.float32, "F16": np.float16, "I64": np.int64, "I8": np.int8}
NAMES = {np.dtype(kind): name for name, kind in TYPES.items()}
WRITE_ROWS = 1 << 16  # rows in memory at a time
ABOUT = "__metadata__"  # texts by name; the format's own word for them


class Stream(NamedTuple):
    """An array of a known type and shape, in parts (n, ...) that are made as they are written."""

    kind: np.dtype[Any]
    shape: tuple[int, ...]
    parts: Iterable[Array]


def whole(array: Array) -> Stream:
    """An array that is there already."""
    return Stream(array.dtype, array.shape, [array])


def chosen(array: Array, which: npt.NDArray[np.bool_]) -> Stream:
    """The rows of an array (n, ...) that a mask (n,) has, copied a few at a time."""

    def parts() -> Iterator[Array]:
        for start in range(0, len(array), WRITE_ROWS):
            here = which[start : start + WRITE_ROWS]
            part = array[start : start + WRITE_ROWS]
            yield part if here.all() else part[here]

    return Stream(array.dtype, (int(which.sum()), *array.shape[1:]), parts())


def write_arrays(
    file: Path, arrays: Mapping[str, Stream], about: Mapping[str, str] | None = None
) -> None:
    """Write arrays by name, part by part, and texts about them."""
    header: dict[str, Any] = {ABOUT: dict(about)} if about else {}
    offset = 0
    for name, (kind, shape, _) in arrays.items():
        end = offset + kind.itemsize * int(np.prod(shape, dtype=int))
        header[name] = {"dtype": NAMES[kind], "shape": shape, "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with file.open("wb") as out:
        out.write(len(text).to_bytes(8, "little") + text)
        for name, stream in arrays.items():
            for part in stream.parts:
                if len(part):
                    assert (part.dtype, part.shape[1:]) == (stream.kind, stream.shape[1:]), name
                    out.write(np.ascontiguousarray(part).data)
            assert out.tell() == 8 + len(text) + header[name]["data_offsets"][1], name


def map_arrays(file: Path) -> tuple[dict[str, Array], dict[str, str]]:
    """The arrays of a safetensors file, memory-mapped read-only, and the texts about them.

    Raises:
        ValueError: the file is cut, or is none.
    """
    size = file.stat().st_size
    with file.open("rb") as read:
        length = int.from_bytes(read.read(8), "little")
        if not 0 < length <= size - 8:
            raise ValueError(f"{file} has no header")
        header = json.loads(read.read(length))
    texts: dict[str, str] = header.pop(ABOUT, {})
    arrays: dict[str, Array] = {}
    for name, about in header.items():
        start, end = about["data_offsets"]
        kind, shape = np.dtype(TYPES[about["dtype"]]), tuple(about["shape"])
        if 8 + length + end > size or end - start != kind.itemsize * np.prod(shape, dtype=int):
            raise ValueError(f"{file} is cut")
        empty = not end - start  # cannot be mapped
        arrays[name] = (
            np.empty(shape, kind)
            if empty
            else np.memmap(file, kind, "r", offset=8 + length + start, shape=shape)
        )
    return arrays, texts
