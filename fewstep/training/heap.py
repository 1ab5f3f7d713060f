"""What a run does to the memory of its process."""

from __future__ import annotations

import ctypes

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # of mallopt(3)


def keep_freed_memory() -> None:
    """Tells glibc to keep what is freed; elsewhere it does nothing.

    Otherwise the heap is given back to the system after every iteration and the next one takes page faults for all of it:
    2 to 3 % of an iteration of 50 ms on a CPU. The peak is the same, it only lasts.
    """
    try:
        libc = ctypes.CDLL("libc.so.6")
    except OSError:  # not Linux, or another C library
        return
    libc.mallopt(_TRIM_THRESHOLD, 1 << 30)
    libc.mallopt(_MMAP_THRESHOLD, 1 << 25)  # the largest that every glibc takes
