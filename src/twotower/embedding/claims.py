"""Who works on what: small files that name their owner, so that no two processes do the same."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import secrets
import shutil
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any

from twotower.settings import ConfigError

log = logging.getLogger(__name__)

SECONDS_BETWEEN_BEATS = 15.0
# Beyond what a network file system may keep an old time of a file for (60 s by default).
SECONDS_TO_BE_STALE = 300.0
SECONDS_BETWEEN_LOOKS = 0.2

_JOB = "job-"  # before the name of a claim that says what its owner makes of the whole folder


class Claims:
    """The claims on the parts of one folder, by name; they lie beside it, in `.<folder>.claims`.

    A claim is a file that only one process can make. It is free again when its owner releases it,
    when its owner is dead (seen at once on the same machine), or when its time has not moved for
    five minutes: while the owner lives, a thread moves it. Two processes may still come to do the
    same work, for example after a long pause of one of them, so what they write must be equal.
    """

    def __init__(self, folder: Path) -> None:
        place = Path(os.path.abspath(folder))
        self.folder = place.with_name(f".{place.name}.claims")
        self._held: set[str] = set()
        self._seen: dict[str, tuple[int, float]] = {}
        self._over = threading.Event()

    def __enter__(self) -> Claims:
        threading.Thread(target=self._beat, daemon=True).start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._over.set()
        for name in list(self._held):
            self.release(name)
        with contextlib.suppress(OSError):
            self.folder.rmdir()

    def take(self, name: str) -> bool:
        """Claim a part, if nobody alive has it.

        Raises:
            ConfigError: the folder cannot be written.
        """
        path = self.folder / name
        if path.exists():
            if not self._is_stale(name):
                return False
            log.info("taking %s over from %s, which is gone", name, self.owner(name) or "somebody")
            # Should another have renewed it in between, two do the same work, and no more.
            path.unlink(missing_ok=True)
        try:
            self.folder.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            reason = error.strerror or error
            raise ConfigError(f"cannot make the folder {self.folder.parent}: {reason}") from error
        temporary = path.with_name(f".{name}.{secrets.token_hex(4)}.tmp")
        try:
            self.folder.mkdir(exist_ok=True)
            temporary.write_text(json.dumps(_this_process()))
            _create(temporary, path)
        except FileExistsError:
            return False
        except FileNotFoundError:  # another has removed the whole folder: all is done
            return False
        except OSError as error:
            raise ConfigError(f"cannot write {path}: {error.strerror or error}") from error
        finally:
            temporary.unlink(missing_ok=True)
        self._held.add(name)
        return True

    def release(self, name: str) -> None:
        """Give a part back that this process holds."""
        self._held.discard(name)
        (self.folder / name).unlink(missing_ok=True)

    @contextmanager
    def holding(self, name: str) -> Iterator[None]:
        """Wait for a part, and hold it."""
        while not self.take(name):
            time.sleep(SECONDS_BETWEEN_LOOKS)
        try:
            yield
        finally:
            self.release(name)

    @contextmanager
    def working(self, job: str) -> Iterator[None]:
        """Work on the folder beside whoever does the same job; wait for those who do another."""
        name, told = f"{_JOB}{job}-{secrets.token_hex(4)}", False
        while True:
            with self.holding("jobs"):
                other = self._other_job(job)
                if not other and self.take(name):
                    break
            if other and not told:
                log.info("waiting for %s, which writes another encoding here", self.owner(other))
                told = True
            time.sleep(SECONDS_BETWEEN_LOOKS)
        try:
            yield
        finally:
            self.release(name)

    def _other_job(self, job: str) -> str:
        """The claim of a living process that does another job; empty if there is none."""
        try:
            names = [name for name in os.listdir(self.folder) if name.startswith(_JOB)]
        except OSError:
            return ""
        for name in names:
            if self._is_stale(name):
                (self.folder / name).unlink(missing_ok=True)
            elif not name.startswith(f"{_JOB}{job}-"):
                return name
        return ""

    def clear(self) -> None:
        """Remove every claim, of whomever: there is no work left."""
        self._held.clear()
        shutil.rmtree(self.folder, ignore_errors=True)

    def owner(self, name: str) -> str:
        """Who holds a part, in words; empty if nobody does."""
        found = _read(self.folder / name)
        return f"process {found['pid']} on {found['host']}" if found else ""

    def _is_stale(self, name: str) -> bool:
        path = self.folder / name
        owner = _read(path)
        try:
            moved = path.stat().st_mtime_ns
        except FileNotFoundError:
            return True
        mine = _this_process()
        if owner and all(owner[key] == mine[key] for key in ("host", "pids")):
            born = _born(owner["pid"])
            if born is None or born != owner["born"]:
                return True
        # By this machine's clock alone: those of two machines may differ.
        now = time.monotonic()
        before, since = self._seen.setdefault(name, (moved, now))
        if before != moved:
            self._seen[name] = (moved, now)
            return False
        return now - since > SECONDS_TO_BE_STALE

    def _beat(self) -> None:
        while not self._over.wait(SECONDS_BETWEEN_BEATS):
            for name in list(self._held):
                with contextlib.suppress(OSError):
                    os.utime(self.folder / name)


def _create(temporary: Path, path: Path) -> None:
    """Give a written file its name, unless there is one of that name."""
    try:
        os.link(temporary, path)
    except FileExistsError:
        raise
    except OSError:  # a file system without links
        with path.open("x") as file:
            file.write(temporary.read_text())


def _read(path: Path) -> dict[str, Any]:
    """A claim's owner; empty if the claim is gone or not written yet."""
    try:
        owner = json.loads(path.read_text())
        return owner if {"host", "pids", "pid", "born"} <= set(owner) else {}
    except (OSError, ValueError, TypeError):
        return {}


def _this_process() -> dict[str, Any]:
    """What tells this process from all others; containers on one host have process ids apart."""
    try:
        pids = os.readlink("/proc/self/ns/pid")
    except OSError:
        pids = ""
    pid = os.getpid()
    return {"host": socket.gethostname(), "pids": pids, "pid": pid, "born": _born(pid)}


def _born(pid: int) -> int | None:
    """When a process was started, in ticks since the machine was; None if it is dead.

    Where there is no `/proc`, 0 for any that is alive.
    """
    try:
        # The name in parentheses may hold anything, so count from its end.
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return None if fields[0] in "ZX" else int(fields[19])
    except (OSError, LookupError, ValueError):
        if Path("/proc/self").exists():
            return None
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return None
    except OSError:
        pass
    return 0
