"""Loops in C for CPUs, built when the project is installed where there is a compiler.

Whoever uses one has the same in torch beside it, for other devices and for where nothing was built: `library()` is None there.
Tests compare the two.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

_VERSION = 1  # of kernels.c
_LEAST_BLOCKS = 256  # that a thread is worth


@functools.cache
def library() -> ctypes.CDLL | None:
    """The functions of kernels.c; None where they were not built, or for another kind of machine."""
    for path in sorted(Path(__file__).parent.glob("_kernels*.so")):
        try:
            found = ctypes.CDLL(str(path))
            if found.kernels_version() == _VERSION:
                return found
        except (OSError, AttributeError):
            continue
    return None


def pointer(tensor: torch.Tensor, first: int = 0) -> ctypes.c_void_p:
    """The address of element `first` of a contiguous CPU tensor."""
    assert tensor.is_contiguous()
    assert tensor.device.type == "cpu"
    return ctypes.c_void_p(tensor.data_ptr() + first * tensor.element_size())


def over_threads(blocks: int, run: Callable[[int, int, int], None]) -> None:
    """Call `run(number, first, end)` for parts of [0, blocks), each in a thread, as many as torch has; ctypes lets go of the
    interpreter's lock."""
    threads = max(1, min(torch.get_num_threads(), blocks // _LEAST_BLOCKS))
    ends = [blocks * number // threads for number in range(threads + 1)]
    if threads == 1:
        run(0, 0, blocks)
        return
    list(_pool(threads).map(run, range(threads), ends[:-1], ends[1:]))


def num_parts(blocks: int) -> int:
    """How many parts `over_threads` makes."""
    return max(1, min(torch.get_num_threads(), blocks // _LEAST_BLOCKS))


@functools.cache
def _pool(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads, thread_name_prefix="native")
