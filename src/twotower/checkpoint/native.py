"""twotower's own checkpoints: one safetensors file with the weights and a header in JSON."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from twotower.checkpoint.atomic import replacing
from twotower.settings import ConfigError

METADATA_KEY = "twotower"


def save_checkpoint(path: Path, weights: Mapping[str, Tensor], header: Mapping[str, Any]) -> None:
    """Write weights by name and a header that JSON can hold, whole or not at all.

    Raises:
        ConfigError: the folder cannot be written, or the disk is full; a previous file stays.
    """
    write_tensors(path, weights, {METADATA_KEY: json.dumps(header, ensure_ascii=False)})


def write_tensors(
    path: Path, weights: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None
) -> None:
    """Write a safetensors file, whole or not at all, readable by whom the umask says.

    Raises:
        ConfigError: the folder cannot be written, or the disk is full; a previous file stays.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    with replacing(path) as temporary:
        try:
            # Hugging Face's readers want to be told whose tensors they are.
            save_file(_separate(weights), temporary, {"format": "pt", **(metadata or {})})
        except SafetensorError as error:
            raise OSError(str(error)) from error


def _separate(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Contiguous tensors on the CPU that share no memory, as safetensors asks."""
    separate: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, tensor in weights.items():
        tensor = tensor.detach().cpu().contiguous()
        storage = tensor.untyped_storage().data_ptr()
        separate[name] = tensor.clone() if storage in seen else tensor
        seen.add(storage)
    return separate


def is_native(path: Path) -> bool:
    """Whether a safetensors file is one of twotower's; False for one that cannot be read."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            return METADATA_KEY in (file.metadata() or {})
    except (SafetensorError, OSError):
        return False


def _not_a_file(path: Path) -> str:
    if path.is_dir():
        return f"{path} is a folder; give a checkpoint file, such as {path / 'best.safetensors'}"
    return f"no such checkpoint: {path}; train one first, or give checkpoint=<file>"


def _read(path: Path, with_weights: bool) -> tuple[dict[str, Any], dict[str, Tensor]]:
    from safetensors import SafetensorError, safe_open

    if not path.is_file():
        raise ConfigError(_not_a_file(path))
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            names = file.keys() if with_weights else ()
            weights = {name: file.get_tensor(name) for name in names}
    except (SafetensorError, OSError) as error:
        raise ConfigError(
            f"{path} cannot be read as a checkpoint: it is truncated, or another kind of file"
        ) from error
    if METADATA_KEY not in metadata:
        raise ConfigError(f"{path} holds tensors, but twotower did not write it")
    header: dict[str, Any] = json.loads(metadata[METADATA_KEY])
    return header, weights


def read_header(path: Path) -> dict[str, Any]:
    """The header of a checkpoint, without reading its weights.

    Raises:
        ConfigError: missing, truncated, a folder, or not a checkpoint of twotower.
    """
    return _read(path, with_weights=False)[0]


def load_checkpoint(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The header and the weights by name that `save_checkpoint` wrote; no code is run.

    Raises:
        ConfigError: as `read_header`.
    """
    return _read(path, with_weights=True)


def file_sha256(path: Path) -> str:
    """SHA-256 of a file's bytes, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
