"""Integer arithmetic that several parts share: rounding, hashing, and indices of segments that lie end to end."""

from __future__ import annotations

import numpy as np

# The increment and the two multipliers of splitmix64 (Steele et al. 2014).
SPLITMIX64 = (np.uint64(0x9E3779B97F4A7C15), np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB))


def ceil_div(value: int, divisor: int) -> int:
    """`value / divisor` rounded up."""
    return -(-value // divisor)


def round_up(value: int, multiple: int) -> int:
    """The smallest multiple of `multiple` that is not below `value`."""
    return -(-value // multiple) * multiple


def mix64(values: np.ndarray) -> np.ndarray:
    """Each value hashed to 64 bits by the finalizer of splitmix64, a bijection; uint64, any shape."""
    _, first, second = SPLITMIX64
    values = (values ^ (values >> np.uint64(30))) * first
    values = (values ^ (values >> np.uint64(27))) * second
    return values ^ (values >> np.uint64(31))


def segment_positions(counts: np.ndarray) -> np.ndarray:
    """0 ... counts[0] - 1, 0 ... counts[1] - 1, and so on, end to end; int64 [sum of `counts`]."""
    return np.arange(int(counts.sum()), dtype=np.int64) - np.repeat(np.cumsum(counts) - counts, counts)


def segment_ids(counts: np.ndarray) -> np.ndarray:
    """counts[0] zeros, counts[1] ones, and so on; int64 [sum of `counts`]."""
    return np.repeat(np.arange(len(counts)), counts)


def segment_ranges(starts: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """starts[0] ... starts[0] + counts[0] - 1, then the same of starts[1], end to end; int64 [sum of `counts`]."""
    return np.repeat(starts - (np.cumsum(counts) - counts), counts) + np.arange(int(counts.sum()), dtype=np.int64)
