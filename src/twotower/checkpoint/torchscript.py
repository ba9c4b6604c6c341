"""The tensors of a TorchScript archive, read without running anything that is in it.

`torch.jit.load` compiles and runs what the archive brings, and torch deprecates it. The tensors are
all that a checkpoint is wanted for: they stand in `data.pkl` and in raw records beside it, and an
unpickler that knows nothing but tensors and modules reads them.
"""

from __future__ import annotations

import pickle
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

STORAGES = {
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
}
LISTS = ("build_intlist", "build_doublelist", "build_boollist", "build_tensorlist")


class ForbiddenGlobal(Exception):
    """A pickle asks for something that is no part of a checkpoint; the message names it."""


class _Recorded:
    """Stands for any module of the archive: keeps its attributes and has no code."""


def _rebuild(storage: Tensor, offset: int, size: Any, stride: Any, *_: Any) -> Tensor:
    return torch.as_strided(storage, tuple(size), tuple(stride), offset).clone()


def _first(value: Any, *_: Any) -> Any:
    return value


class _TensorUnpickler(pickle.Unpickler):
    """Reads tensors, numbers, texts, lists and modules; anything else is refused by name."""

    def __init__(self, archive: zipfile.ZipFile, root: str) -> None:
        super().__init__(archive.open(f"{root}data.pkl"))
        self._record: Callable[[str], bytes] = lambda key: archive.read(f"{root}data/{key}")
        self._storages: dict[str, Tensor] = {}

    def find_class(self, module: str, name: str) -> Any:
        if module.partition(".")[0] == "__torch__":
            return _Recorded
        if module == "torch" and name in STORAGES:
            return STORAGES[name]
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return _rebuild
        if (module, name) == ("collections", "OrderedDict"):
            return OrderedDict
        if module == "torch.jit._pickle" and name in (*LISTS, "restore_type_tag"):
            return _first
        raise ForbiddenGlobal(f"{module}.{name}")

    def persistent_load(self, pid: Any) -> Tensor:
        kind, dtype, key, _, _ = pid
        if kind != "storage":
            raise ForbiddenGlobal(str(kind))
        if key not in self._storages:
            raw = bytearray(self._record(key))
            empty = torch.empty(0, dtype=dtype)
            self._storages[key] = torch.frombuffer(raw, dtype=dtype) if raw else empty
        return self._storages[key]


def _tensors(module: _Recorded, prefix: str = "") -> Iterator[tuple[str, Tensor]]:
    for name, value in vars(module).items():
        if isinstance(value, Tensor):
            yield prefix + name, value
        elif isinstance(value, _Recorded):
            yield from _tensors(value, f"{prefix}{name}.")


def archive_root(path: Path) -> str | None:
    """The folder inside a TorchScript archive that holds its records; None if the file is none."""
    if not zipfile.is_zipfile(path):
        return None
    with zipfile.ZipFile(path) as archive:
        names = archive.namelist()
    for name in names:
        root, found, rest = name.partition("constants.pkl")
        if found and not rest and f"{root}data.pkl" in names:
            return root
    return None


def read_torchscript(path: Path, root: str) -> dict[str, Tensor]:
    """The tensors of an archive by their dotted names, parameters and buffers alike.

    Raises:
        ForbiddenGlobal: the pickle asks for more than tensors and modules.
        pickle.UnpicklingError, zipfile.BadZipFile, KeyError and others: the archive is damaged.
    """
    with zipfile.ZipFile(path) as archive:
        module = _TensorUnpickler(archive, root).load()
    if not isinstance(module, _Recorded):
        raise pickle.UnpicklingError("the archive holds no module")
    return dict(_tensors(module))
