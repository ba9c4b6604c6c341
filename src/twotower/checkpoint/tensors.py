"""Tensors by name out of anybody's file, without running anything that is in it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from twotower.checkpoint.torchscript import ForbiddenGlobal, archive_root, read_torchscript
from twotower.settings import ConfigError


def read_tensors(path: Path, kind: str) -> dict[str, Tensor]:
    """The tensors of a safetensors file, a TorchScript archive or a plain state dict.

    A state dict may lie under "state_dict", and its names may begin with "module." (checkpoints of
    training programs).

    Args:
        kind: what the file should be, for the sentence about one that is not.

    Raises:
        ConfigError: missing, truncated, no weights at all, or asking for more than tensors.
    """
    if not path.is_file():
        what = "is a folder" if path.is_dir() else "does not exist"
        raise ConfigError(f"{path} {what}; it should be {kind}")
    try:
        loaded = _load(path)
    # A damaged file can make an unpickler raise nearly anything; each means the same to the user.
    except Exception as error:
        raise _wrong_file(path, kind, error) from error
    if isinstance(loaded, dict) and isinstance(loaded.get("state_dict"), dict):
        loaded = loaded["state_dict"]
    tensors = loaded if isinstance(loaded, Mapping) else {}
    return {
        name.removeprefix("module."): tensor
        for name, tensor in tensors.items()
        if isinstance(name, str) and isinstance(tensor, Tensor)
    }


def _load(path: Path) -> Any:
    if path.suffix == ".safetensors":
        from safetensors.torch import load_file

        return load_file(path)
    root = archive_root(path)
    if root is not None:
        return read_torchscript(path, root)
    return torch.load(path, map_location="cpu", weights_only=True)


def _wrong_file(path: Path, kind: str, error: BaseException) -> ConfigError:
    planted = re.search(r"GLOBAL ([\w.]+)", str(error))
    if isinstance(error, ForbiddenGlobal) or planted:
        what = str(error) if planted is None else planted[1]
        return ConfigError(
            f"{path} was refused: it asks to run {what}, which no CLIP checkpoint needs"
        )
    return ConfigError(f"{path} cannot be read as {kind}: it is truncated, or another kind of file")
