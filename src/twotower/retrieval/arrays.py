"""Arrays in a safetensors file, written part by part and read as memory maps.

`safetensors` itself would hold all bytes in memory at once to write them; an index may be larger.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]

TYPES = {"F64": np.float64, "F32": np.float32, "F16": np.float16, "I64": np.int64, "I8": np.int8}
NAMES = {np.dtype(kind): name for name, kind in TYPES.items()}
WRITE_ROWS = 1 << 16  # rows in memory at a time


def write_arrays(file: Path, arrays: Mapping[str, Sequence[Array]]) -> None:
    """Write arrays by name, each the concatenation of parts (n, ...) of one type and width."""
    header, offset = {}, 0
    for name, parts in arrays.items():
        end = offset + sum(part.nbytes for part in parts)
        shape = [sum(len(part) for part in parts), *parts[0].shape[1:]]
        about = {"dtype": NAMES[parts[0].dtype], "shape": shape, "data_offsets": [offset, end]}
        header[name], offset = about, end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with file.open("wb") as out:
        out.write(len(text).to_bytes(8, "little") + text)
        for parts in arrays.values():
            for part in parts:
                for start in range(0, len(part), WRITE_ROWS):
                    out.write(np.ascontiguousarray(part[start : start + WRITE_ROWS]).data)


def map_arrays(file: Path) -> dict[str, Array]:
    """The arrays of a safetensors file, memory-mapped read-only.

    Raises:
        ValueError: the file is cut, or is none.
    """
    size = file.stat().st_size
    with file.open("rb") as read:
        length = int.from_bytes(read.read(8), "little")
        if not 0 < length <= size - 8:
            raise ValueError(f"{file} has no header")
        header = json.loads(read.read(length))
    arrays: dict[str, Array] = {}
    for name, about in header.items():
        if name == "__metadata__":
            continue
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
    return arrays
