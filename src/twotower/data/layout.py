"""Writing a folder so that a reader sees the whole of it or nothing."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from twotower.settings import ConfigError


@contextmanager
def folder_in_one_piece(path: Path) -> Iterator[Path]:
    """Give a temporary folder beside `path` to fill, and rename it to `path` at the end.

    If the work fails or is stopped, nothing of it stays. If another process was first, its folder
    stays.

    Raises:
        ConfigError: the parent folder cannot be written, or the disk is full.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{path.name}-", dir=path.parent))
    except OSError as error:
        raise ConfigError(f"{path} cannot be made: {error.strerror}") from error
    try:
        yield temporary
        temporary.chmod(0o755)  # mkdtemp's folders are for their owner alone
        try:
            os.rename(temporary, path)
        except OSError:
            if not any(path.iterdir()):
                raise
    except OSError as error:
        raise ConfigError(f"{path} cannot be written: {error.strerror or error}") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
