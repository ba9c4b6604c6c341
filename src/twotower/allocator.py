"""The C library's allocator, told to suit large arrays that come and go."""

from __future__ import annotations

import ctypes

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # <malloc.h>


def keep_freed_memory() -> None:
    """Let the C library keep large blocks that are freed, for the next layer of the same size.

    By default glibc gives each activation's pages back and faults them in anew, which takes half
    of the time of a convolutional tower on CPUs. Other C libraries are left as they are.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_MMAP_THRESHOLD, 1 << 30)
        mallopt(_M_TRIM_THRESHOLD, (1 << 31) - 1)
