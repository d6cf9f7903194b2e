"""Where the features of many tf.train.Examples lie, found for all of them at once in NumPy.

It knows the one form that writers give records of numbers today: a features message of map entries (key, value), each value a
packed list. Whatever looks otherwise is left to the general reader (`tfrecord._find`), which is also the oracle of the tests.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

_KEY, _VALUE, _FEATURES = 0x0A, 0x12, 0x0A  # tags: field 1 and field 2, both of length-delimited content
FLOATS, INTEGERS = 2, 3  # field numbers of a Feature's list
Place = tuple[int, np.ndarray, np.ndarray]  # FLOATS or INTEGERS, begin [n], end [n] of the packed values


def locate(data: np.ndarray, begins: np.ndarray, ends: np.ndarray, names: Sequence[str]) -> dict[str, Place] | None:
    """Places of features in `data` (uint8, followed by at least 64 bytes that belong to no example).

    Args:
        begins, ends: int64 [n], where the examples lie.
        names: the features that every example has, in any order, and no others.

    Returns:
        The place of every feature, or None if some example has another form.
    """
    count = len(begins)
    form = np.zeros((len(names), count), np.int64)
    first, last = np.zeros_like(form), np.zeros_like(form)
    ok = data[begins] == _FEATURES
    size, at = _varints(data, begins + 1)
    ok &= at + size == ends
    keys = [np.frombuffer(name.encode(), np.uint8) for name in names]
    every = np.arange(count)
    for _ in names:
        if not ok.all():
            return None
        ok = data[at] == _FEATURES
        size, at = _varints(data, at + 1)
        entry_end = at + size
        ok &= (data[at] == _KEY) & (entry_end <= ends)
        key_size, at = _varints(data, at + 1)
        which = np.full(count, -1)
        for number, key in enumerate(keys):
            same = key_size == len(key)
            if same.any():
                rows = np.flatnonzero(same)
                hit = (data[np.minimum(at[rows, None] + np.arange(len(key)), len(data) - 1)] == key).all(axis=1)
                which[rows[hit]] = number
        ok &= which >= 0
        at = np.minimum(at + key_size, ends)
        ok &= data[at] == _VALUE
        size, at = _varints(data, at + 1)
        ok &= at + size == entry_end
        tag = data[np.minimum(at, ends)]
        kind = (tag >> 3).astype(np.int64)
        ok &= ((tag & 7) == 2) & ((kind == FLOATS) | (kind == INTEGERS))
        size, at = _varints(data, at + 1)
        ok &= at + size == entry_end
        ok &= data[np.minimum(at, ends)] == _KEY
        size, at = _varints(data, at + 1)
        ok &= at + size == entry_end
        if not ok.all():
            return None
        form[which, every], first[which, every], last[which, every] = kind, at, entry_end
        at = entry_end
    if (at != ends).any() or not last.all() or (form != form[:, :1]).any():
        return None
    return {name: (int(form[n, 0]), first[n], last[n]) for n, name in enumerate(names)}


def _varints(data: np.ndarray, at: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Varints of at most four bytes at every place, and the places behind them."""
    byte = data[np.minimum(at, len(data) - 4)].astype(np.int64)
    value, size, more = byte & 0x7F, np.ones(len(at), np.int64), byte >= 0x80
    for shift in (7, 14, 21):
        if not more.any():
            break
        byte = np.where(more, data[np.minimum(at + size, len(data) - 1)], 0).astype(np.int64)
        value |= (byte & 0x7F) << shift
        size += more
        more = byte >= 0x80
    return value, at + size
