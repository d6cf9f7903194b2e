"""Finds where the features of many tf.train.Examples lie, for all of them at once in NumPy.

It knows the form in which writers store numbers today: a features message of map entries (key, value), each value a packed
list. The general reader (`tfrecord._find`) reads all other forms, and is the oracle of the tests.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from bert_fast.protobuf import BYTES, fields

_KEY, _VALUE, _FEATURES = 0x0A, 0x12, 0x0A  # tags: field 1 and field 2, both of length-delimited content
FLOATS, INTEGERS = 2, 3  # field numbers of a Feature's list
Place = tuple[int, np.ndarray, np.ndarray]  # FLOATS or INTEGERS, begin [n], end [n] of the packed values


def locate(data: np.ndarray, begins: np.ndarray, ends: np.ndarray, names: Sequence[str]) -> dict[str, Place] | None:
    """Places of features in `data` (uint8, with at least 64 more bytes after the last example).

    Args:
        begins, ends: int64 [n], where the examples lie.
        names: the features that every example has, in any order, and no others.

    Returns:
        The place of every feature, or None if some example has another form.
    """
    entries = _entries(data[int(begins[0]) : int(ends[0])].tobytes(), names)
    if entries is None:
        return None
    count = len(begins)
    form = np.zeros((len(names), count), np.int64)
    first, last = np.zeros_like(form), np.zeros_like(form)
    size, at = _varints(data, begins + 1)
    if not ((data[begins] == _FEATURES) & (at + size == ends)).all():
        return None
    every = np.arange(count)
    for entry in entries:
        if entry.opens(data, at) and (at + entry.size <= ends).all():
            which, kind, value, end = entry.which, entry.form, at + len(entry.header), at + entry.size
            form[which], first[which], last[which] = kind, value, end
        else:
            found = _parsed(data, at, ends, names)
            if found is None:
                return None
            each, kinds, value, end = found
            form[each, every], first[each, every], last[each, every] = kinds, value, end
        at = end
    if (at != ends).any() or not last.all() or (form != form[:, :1]).any():
        return None
    return {name: (int(form[n, 0]), first[n], last[n]) for n, name in enumerate(names)}


@dataclass(frozen=True)
class _Entry:
    """A map entry of one example: `header` are the bytes from its tag to its values, `size` is that of the whole entry."""

    header: np.ndarray
    size: int
    which: int
    form: int

    def opens(self, data: np.ndarray, at: np.ndarray) -> bool:
        """Whether the same header is at every place; then the sizes are the same, too."""
        length = len(self.header)
        windows = np.ndarray((len(data) - length, length), np.uint8, data, strides=(1, 1))
        return bool((windows[np.minimum(at, len(windows) - 1)] == self.header).all())


def _entries(example: bytes, names: Sequence[str]) -> list[_Entry] | None:
    """The entries of an example in order, or None if it has another form."""
    found = []
    try:
        ((*_, at, end),) = fields(example)
        for *entry, begin, after in fields(example, at, end):
            (*first, key, key_end), (*second, value, value_end) = fields(example, begin, after)
            ((form, kind, values, values_end),) = fields(example, value, value_end)
            ((*only, packed, _),) = fields(example, values, values_end)
            if (entry, first, second, only) != ([1, BYTES], [1, BYTES], [2, BYTES], [1, BYTES]) or kind != BYTES:
                return None
            if form not in (FLOATS, INTEGERS):
                return None
            which = names.index(example[key:key_end].decode())
            found.append(_Entry(np.frombuffer(example[at:packed], np.uint8), after - at, which, form))
            at = after
    except (ValueError, IndexError):
        return None
    return found if len(found) == len(names) else None


def _parsed(
    data: np.ndarray, at: np.ndarray, ends: np.ndarray, names: Sequence[str]
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray] | None:
    """Of entries that begin at `at`: which feature, its form, begin and end of its values. None if one has another form."""
    ok = data[at] == _FEATURES
    size, at = _varints(data, at + 1)
    entry_end = at + size
    ok &= (data[at] == _KEY) & (entry_end <= ends)
    key_size, at = _varints(data, at + 1)
    which = np.full(len(at), -1)
    for number, name in enumerate(names):
        rows = np.flatnonzero(key_size == len(name))
        if len(rows):
            key = np.frombuffer(name.encode(), np.uint8)
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
    return (which, kind, at, entry_end) if ok.all() else None


def _varints(data: np.ndarray, at: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Varints of at most four bytes at every place, and the places after them."""
    byte = data[np.minimum(at, len(data) - 4)].astype(np.int64)
    value, size, more = byte & 0x7F, np.ones(len(at), np.int64), byte >= 0x80
    for shift in (7, 14, 21):
        if not more.any():
            break
        byte = np.where(more, data[np.minimum(at + size, len(data) - 1)], 0).astype(np.int64)
        value |= (byte & 0x7F) << shift
        size += more
        more = byte >= 0x80
    value[more] = 1 << 40  # more than four bytes: so large that no size agrees with it
    return value, at + size
