"""Many pictures from the network, politely: few connections, a pace, retries, and a resume file."""

from __future__ import annotations

import enum
import io
import logging
import os
import threading
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from itertools import islice
from pathlib import Path
from typing import NamedTuple, TextIO

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv as pa_csv
import requests
from PIL import Image
from requests.exceptions import InvalidSchema, InvalidURL, MissingSchema

from twotower.console import progress
from twotower.settings import ConfigError

log = logging.getLogger(__name__)

AGENT = "twotower (https://pypi.org/project/twotower)"
GONE = (403, 404, 410, 451)
BUSY = (408, 429, 500, 502, 503, 504)
LONGEST_WAIT = 120.0  # seconds; a picture that has to wait longer is left to the next run
ROUND = 32  # downloads a connection between two entries of the record
UNAVAILABLE = "photo_unavailable"  # where Flickr sends one on from a picture that was deleted


class State(enum.Enum):
    """What came of a download; what failed is tried again by the next run."""

    ok = "ok"
    gone = "gone"
    failed = "failed"


class Download(NamedTuple):
    """A picture to fetch, and where to put it."""

    key: int
    url: str
    path: Path


class Outcome(NamedTuple):
    """What came of it, and why."""

    key: int
    state: State
    reason: str = ""


@dataclass
class Fetcher:
    """Fetches pictures, from as many threads as there are connections.

    When a server asks one of them to wait, all of them do.

    Attributes:
        connections: at a time, at most.
        per_second: requests a second, at most; 0 is as many as the connections give.
        timeout: seconds that a server may be silent.
        tries: requests for one picture before it counts as failed.
        pause: seconds before the second try; twice as many before each further one.
    """

    connections: int = 16
    per_second: float = 0.0
    timeout: float = 20.0
    tries: int = 4
    pause: float = 1.0
    _next: float = field(default=0.0, init=False)
    _lock: threading.Lock = field(default_factory=threading.Lock, init=False)

    def __post_init__(self) -> None:
        self._session = requests.Session()
        self._session.headers["User-Agent"] = AGENT
        adapter = requests.adapters.HTTPAdapter(
            pool_connections=self.connections, pool_maxsize=self.connections, pool_block=True
        )
        for scheme in ("http://", "https://"):
            self._session.mount(scheme, adapter)

    def fetch(self, job: Download) -> Outcome:
        """Fetch one picture, if it is not there, and say what came of it.

        Raises:
            OSError: its file cannot be written.
        """
        if job.path.is_file():
            return Outcome(job.key, State.ok)
        reason = ""
        for attempt in range(self.tries):
            self._keep_pace()
            try:
                response = self._session.get(job.url, timeout=self.timeout)
            except (InvalidURL, MissingSchema, InvalidSchema) as error:
                return Outcome(job.key, State.gone, str(error))
            except requests.RequestException as error:
                reason = type(error).__name__
            else:
                status = response.status_code
                if status in GONE or UNAVAILABLE in response.url:
                    return Outcome(job.key, State.gone, f"HTTP {status}")
                if response.ok:
                    return self._keep(job, response.content)
                reason = f"HTTP {status}"
                asked = _seconds(response.headers.get("Retry-After", ""))
                if status not in BUSY or asked > LONGEST_WAIT:
                    break
                self._hold(asked)
            if attempt + 1 < self.tries:
                time.sleep(min(self.pause * 2**attempt, LONGEST_WAIT))
        return Outcome(job.key, State.failed, reason)

    def _keep(self, job: Download, data: bytes) -> Outcome:
        try:
            with Image.open(io.BytesIO(data)) as image:
                image.verify()
        except Exception:  # Pillow's readers fail in many ways on what is no picture
            return Outcome(job.key, State.gone, "not a picture")
        job.path.parent.mkdir(parents=True, exist_ok=True)
        partial = job.path.with_name(f".{job.path.name}.{threading.get_ident()}")
        partial.write_bytes(data)
        os.replace(partial, job.path)
        return Outcome(job.key, State.ok)

    def _keep_pace(self) -> None:
        with self._lock:
            now = time.monotonic()
            wait = max(0.0, self._next - now)
            if self.per_second:
                self._next = max(now, self._next) + 1 / self.per_second
        if wait:
            time.sleep(wait)

    def _hold(self, seconds: float) -> None:
        with self._lock:
            self._next = max(self._next, time.monotonic() + seconds)


def _seconds(retry_after: str) -> float:
    """How long a server asks to wait, by a number of seconds or a date; 0 if it does not."""
    if retry_after.isdecimal():
        return float(retry_after)
    try:
        return (parsedate_to_datetime(retry_after) - datetime.now(UTC)).total_seconds()
    except (ValueError, TypeError):  # no date, or one without a time zone
        return 0.0


def download_all(
    jobs: Iterable[Download], total: int, record: Path, fetcher: Fetcher
) -> Counter[State]:
    """Fetch what the record does not have yet, and count what came of all of it.

    Args:
        record: the resume file, to which each outcome is appended: key, state, reason.
        total: how many jobs there are.

    Raises:
        ConfigError: nothing of a whole round, or nothing at all, came (which is not recorded, since
            the network or the server may be to blame), or the disk cannot be written.
    """
    counts, settled = read_record(record)
    try:
        with (
            progress("downloading", total, "pictures") as line,
            _appending(record) as lines,
            ThreadPoolExecutor(fetcher.connections) as pool,
        ):
            line.skip(min(counts.total(), total))
            left = (job for job in jobs if not is_in(settled, job.key))
            while part := list(islice(left, ROUND * fetcher.connections)):
                outcomes = list(pool.map(fetcher.fetch, part))
                here = Counter(outcome.state for outcome in outcomes)
                is_whole = len(part) == ROUND * fetcher.connections
                if not here[State.ok] and (is_whole or not counts[State.ok]):
                    raise _nothing_came(part, outcomes)
                lines.writelines(f"{o.key}\t{o.state.value}\t{_flat(o.reason)}\n" for o in outcomes)
                lines.flush()
                counts += here
                line.advance(len(part), f"{counts[State.gone]:,} gone")
    except OSError as error:
        raise ConfigError(
            f"{record.parent} cannot be written: {error.strerror or error}; "
            "run it again to go on from here"
        ) from error
    return counts


def _nothing_came(part: Sequence[Download], outcomes: Sequence[Outcome]) -> ConfigError:
    return ConfigError(
        f"none of {len(part)} pictures could be fetched, for example {part[0].url} "
        f"({outcomes[0].reason}); check the network and data.url, and run it again"
    )


def _flat(reason: str) -> str:
    return " ".join(reason.split()).replace('"', "'")[:200]


def read_record(record: Path) -> tuple[Counter[State], npt.NDArray[np.int64]]:
    """How many are settled (ok or gone), and their keys, sorted."""
    if not record.is_file() or not record.stat().st_size:
        return Counter(), np.empty(0, np.int64)
    names = ["key", "state", "reason"]
    try:
        table = pa_csv.read_csv(
            record,
            pa_csv.ReadOptions(column_names=names),
            pa_csv.ParseOptions(
                delimiter="\t", quote_char=False, invalid_row_handler=lambda row: "skip"
            ),
            pa_csv.ConvertOptions(
                column_types=dict.fromkeys(("key", "state", "reason"), pa.string())
            ),
        )
        settled = table.filter(pc.is_in(table["state"], pa.array(["ok", "gone"])))
        keys = settled["key"].cast(pa.int64()).to_numpy()
    except pa.ArrowException as error:
        raise ConfigError(
            f"{record} is damaged ({error}); remove it to look at all files"
        ) from error
    keys, first = np.unique(keys, return_index=True)
    states = settled["state"].to_numpy()[first]
    counts = Counter({state: int((states == state.value).sum()) for state in State})
    return counts, keys


def is_in(keys: npt.NDArray[np.int64], key: int) -> bool:
    """Whether a sorted array has a key."""
    place = int(np.searchsorted(keys, key))
    return place < len(keys) and int(keys[place]) == key


def _appending(record: Path) -> TextIO:
    """The record, ready for another line even if a killed run left half of one."""
    record.parent.mkdir(parents=True, exist_ok=True)
    with record.open("ab+") as file:
        if file.tell():
            file.seek(-1, os.SEEK_END)
            if file.read(1) != b"\n":
                file.write(b"\n")
    return record.open("a", encoding="utf-8")
