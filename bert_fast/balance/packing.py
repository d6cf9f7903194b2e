"""Packing sequences of many lengths into rows of one length, on the histogram of lengths.

After "Efficient Sequence Packing without Cross-contamination" (Krell et al., arXiv 2107.02027): work is done per length and
per kind of row, not per sample, so that its time hardly depends on the number of samples. Attention and positions never
cross samples: a row only says which samples lie side by side.
"""

from __future__ import annotations

from bisect import bisect_left, insort

import numpy as np

from bert_fast.integers import ceil_div


def pack(
    lengths: np.ndarray, row_length: int, depth: int, first: str = "longest", order: np.ndarray | None = None
) -> tuple[np.ndarray, int]:
    """Assign samples, longest first, to rows.

    Args:
        lengths: integers [N], each in [1, row_length].
        depth: most samples in one row.
        first: `longest`: a sample goes to the fullest row it fits in (longest-pack-first, best fit); `shortest`: to the
            emptiest (shortest-pack-first, worst fit). A new row is opened when it fits in none.
        order: indices of samples, longest first, if known.

    Returns:
        The row of every sample, int64 [N], and the number of rows.
    """
    order = np.argsort(-lengths.astype(np.int64), kind="stable") if order is None else order
    counts = np.bincount(lengths, minlength=row_length + 1)
    row_of = np.empty(len(lengths), np.int64)
    rows = _OpenRows(depth)
    num_rows = start = 0
    for length in np.flatnonzero(counts)[::-1].tolist():
        left = int(counts[length])
        while left:
            room = rows.smallest(length) if first == "longest" else rows.largest(length)
            if room is None:
                room, filled = row_length, 0
                numbers = np.arange(num_rows, num_rows + ceil_div(left, min(depth, row_length // length)))
                num_rows += len(numbers)
                fits = min(depth, row_length // length)
            else:
                numbers, filled = rows.take(room)
                fits = min(depth - filled, room // length) if first == "longest" else 1
                used = ceil_div(left, fits)
                rows.put(room, numbers[used:], filled)
                numbers = numbers[:used]
            taken = min(left, len(numbers) * fits)
            row_of[order[start : start + taken]] = np.repeat(numbers, fits)[:taken]
            start, left = start + taken, left - taken
            full, rest = divmod(taken, fits)
            rows.put(room - fits * length, numbers[:full], filled + fits)
            rows.put(room - rest * length, numbers[full:], filled + rest)
    return row_of, num_rows


class _OpenRows:
    """Rows that have room left, by their room: groups of (row numbers, samples in each of them)."""

    def __init__(self, depth: int) -> None:
        self._depth = depth
        self._groups: dict[int, list[tuple[np.ndarray, int]]] = {}
        self._rooms: list[int] = []  # rooms that have groups, ascending

    def smallest(self, length: int) -> int | None:
        """The least room that holds `length`."""
        place = bisect_left(self._rooms, length)
        return self._rooms[place] if place < len(self._rooms) else None

    def largest(self, length: int) -> int | None:
        """The most room, if it holds `length`."""
        return self._rooms[-1] if self._rooms and self._rooms[-1] >= length else None

    def take(self, room: int) -> tuple[np.ndarray, int]:
        groups = self._groups[room]
        found = groups.pop()
        if not groups:
            del self._groups[room], self._rooms[bisect_left(self._rooms, room)]
        return found

    def put(self, room: int, numbers: np.ndarray, filled: int) -> None:
        if not len(numbers) or room == 0 or filled >= self._depth:
            return
        if room not in self._groups:
            self._groups[room] = []
            insort(self._rooms, room)
        self._groups[room].append((numbers, filled))
