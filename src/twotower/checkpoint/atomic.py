"""Writing a file or a folder so that a reader sees the whole of it or what was there before."""

from __future__ import annotations

import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from twotower.settings import ConfigError


def is_taken(path: Path) -> bool:
    """Whether a folder cannot be made here: there is a file, or a folder that is not empty."""
    return path.exists() and (not path.is_dir() or any(path.iterdir()))


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a temporary name beside `path`; what is written there then takes its place.

    The folder is made if missing. On any error what stood at `path` is untouched.

    Raises:
        ConfigError: the folder cannot be written, or the disk is full.
    """
    # Process ids are told apart by one machine only, and a folder may be shared by many.
    temporary = path.with_name(f".{path.name}.{os.getpid()}-{secrets.token_hex(4)}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.touch()
        mode = temporary.stat().st_mode
        yield temporary
        # Some writers (safetensors) make files that nobody else may read, whatever the umask.
        if temporary.stat().st_nlink == 1:  # a link keeps the mode of the file that it shares
            temporary.chmod(mode)
        with temporary.open("rb") as written:
            os.fsync(written.fileno())
        os.replace(temporary, path)
    except OSError as error:
        raise ConfigError(f"cannot write {path}: {error.strerror or error}") from error
    finally:
        if temporary.is_file():
            temporary.unlink()


@contextmanager
def replacing_folder(path: Path) -> Iterator[Path]:
    """Yield a temporary folder beside `path`; what is put into it then takes the place of `path`.

    A folder that stands there already is replaced if it holds nothing but files of the same names.
    On any error it is untouched.

    Raises:
        ConfigError: `path` is a file or holds other things, cannot be written, or the disk is full.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    if path.exists() and not path.is_dir():
        raise ConfigError(f"{path} is a file; give the name of a folder")
    try:
        temporary.mkdir(parents=True)
        yield temporary
        _replace_folder(path, temporary)
    except OSError as error:
        raise ConfigError(f"cannot write {path}: {error.strerror or error}") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _replace_folder(path: Path, new: Path) -> None:
    if not path.exists():
        new.rename(path)
        return
    others = sorted({file.name for file in path.iterdir()} - {file.name for file in new.iterdir()})
    if others:
        raise ConfigError(
            f"{path} holds {others[0]}, which would be lost; give a new folder, or empty this one"
        )
    old = path.with_name(f".{path.name}.{os.getpid()}.old")
    path.rename(old)
    new.rename(path)
    shutil.rmtree(old, ignore_errors=True)


def link_or_copy(source: Path, target: Path) -> None:
    """The same file under a second name, without a copy where the file system can."""
    target.unlink(missing_ok=True)
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)
