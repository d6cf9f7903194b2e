"""Settings of the C library's memory: keep freed blocks for reuse, and bound what a piece of work may allocate."""

from __future__ import annotations

import ctypes
import os
import platform
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3


def keep_freed_memory() -> None:
    """Tell glibc to keep freed memory: otherwise the kernel maps and zeroes every large array or tensor anew.

    This is worth about 10 % of a small model's step (docs/performance.md), and helps the import, whose arrays have the same
    sizes from block to block. Does nothing with other C libraries.
    """
    _mallopt({_MMAP_THRESHOLD: 1 << 30, _TRIM_THRESHOLD: (1 << 31) - 1})


def return_freed_memory() -> None:
    """Tell glibc to give the memory of every large array or tensor back as soon as it is freed.

    What a process has in memory is then what it holds, without what lies idle between: a third less for a step of BERT, which
    takes longer for it, as the kernel maps and zeroes pages anew. Does nothing with other C libraries.
    """
    _mallopt({_MMAP_THRESHOLD: 1 << 20})


def _mallopt(settings: dict[int, int]) -> None:
    """Set glibc's parameters, by their numbers in malloc.h."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if os.name == "posix" else None
    if mallopt is not None and platform.libc_ver()[0] == "glibc":
        for parameter, value in settings.items():
            mallopt(parameter, value)


@contextmanager
def memory_at_most(extra: int) -> Iterator[None]:
    """Inside the block, the process may allocate at most `extra` bytes more than it has; further allocations fail.

    Meant for libraries that unpack what a file claims: a compressed chunk of a few kilobytes can stand for gigabytes. The
    limit holds for all threads of the process, so use it in a process of its own. Does nothing outside of Linux.

    Raises:
        MemoryError: or the library's own error for a failed allocation.
    """
    if sys.platform != "linux":
        yield
        return
    import resource

    before = resource.getrlimit(resource.RLIMIT_DATA)
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[5])  # data and stack
    limit = pages * resource.getpagesize() + extra
    is_lower = before[0] == resource.RLIM_INFINITY or limit < before[0]
    if is_lower:
        resource.setrlimit(resource.RLIMIT_DATA, (limit, before[1]))
    try:
        yield
    finally:
        if is_lower:
            resource.setrlimit(resource.RLIMIT_DATA, before)
