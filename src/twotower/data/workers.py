"""What a loader's worker process must not inherit."""

from __future__ import annotations

import signal


def plain_signals(worker: int) -> None:
    """Let a worker end when it is told to; give it to a `DataLoader` as `worker_init_fn`.

    A forked worker inherits handlers that make its parent save before it stops, and would then
    outlive the parent's request to end. Ctrl-C is the parent's to answer.
    """
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
