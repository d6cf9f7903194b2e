"""The C library's allocator: for work that takes and frees the same large pieces again and again, and with a bound."""

from __future__ import annotations

import ctypes
import os
import platform
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def keep_freed_memory() -> None:
    """Tell glibc to keep freed memory: else every large array or tensor is mapped and zeroed by the kernel anew.

    Worth about 10 % of a small model's step (docs/performance.md); the import's arrays are alike from block to block, too.
    Other C libraries are left alone.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if os.name == "posix" else None
    if mallopt is not None and platform.libc_ver()[0] == "glibc":
        m_trim_threshold, m_mmap_threshold = -1, -3
        mallopt(m_mmap_threshold, 1 << 30)
        mallopt(m_trim_threshold, (1 << 31) - 1)


@contextmanager
def memory_at_most(extra: int) -> Iterator[None]:
    """In the block the process may allocate `extra` bytes more than it has; beyond that an allocation fails (Linux).

    For libraries that unpack what a file claims: a compressed chunk of some kilobytes can stand for gigabytes. All threads of
    the process are bound; use it in a process of its own.

    Raises:
        MemoryError, or the library's own error of a failed allocation.
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
