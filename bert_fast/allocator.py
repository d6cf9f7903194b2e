"""The C library's allocator, for work that takes and frees the same large pieces again and again."""

from __future__ import annotations

import ctypes
import os
import platform


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
