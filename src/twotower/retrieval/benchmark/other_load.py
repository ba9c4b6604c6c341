"""How busy other processes kept the machine while something was measured."""

from __future__ import annotations

import os
import time
from pathlib import Path

IDLE = (3, 4)  # the columns of /proc/stat of idling, and of waiting for a disk


class OtherLoad:
    """Counts from when it is made."""

    def __init__(self) -> None:
        self._start = _seconds()

    def share(self) -> float | None:
        """The share of all cores' time since then that others used; None where it is not known."""
        now = _seconds()
        if self._start is None or now is None:
            return None
        clock, busy, own = (new - old for new, old in zip(now, self._start, strict=True))
        share = max(busy - own, 0.0) / max(clock * (os.cpu_count() or 1), 1e-9)
        return round(min(share, 1.0), 3)


def _seconds() -> tuple[float, float, float] | None:
    """Of the clock, that all cores were busy, and of this process."""
    try:
        first = Path("/proc/stat").read_text().split("\n", 1)[0].split()
        spent = [int(value) / os.sysconf("SC_CLK_TCK") for value in first[1:9]]
    except (OSError, ValueError):
        return None
    busy = sum(value for place, value in enumerate(spent) if place not in IDLE)
    return time.perf_counter(), busy, time.process_time()
