"""The part of protobuf's wire format that is needed to read TensorFlow's files without TensorFlow."""

from __future__ import annotations

from collections.abc import Iterator

VARINT, FIXED64, BYTES, FIXED32 = 0, 1, 2, 5
_SIZES = {FIXED64: 8, FIXED32: 4}
_LONGEST_VARINT = 10  # bytes: 64 bits in groups of seven


def varint(data: bytes, at: int) -> tuple[int, int]:
    """The varint at byte `at` of `data`, and the index of the byte after it.

    Raises:
        IndexError: the data ends in it.
        ValueError: it is longer than the 10 bytes that 64 bits take.
    """
    value = 0
    for count in range(_LONGEST_VARINT):
        byte = data[at + count]
        value |= (byte & 0x7F) << 7 * count
        if byte < 0x80:
            return value, at + count + 1
    raise ValueError(f"an integer at byte {at} is longer than {_LONGEST_VARINT} bytes")


def fields(data: bytes, at: int = 0, end: int | None = None) -> Iterator[tuple[int, int, int, int]]:
    """(field number, wire type, begin, end) of the fields of the message data[at:end].

    Raises:
        ValueError: not a message: an unknown wire type, or a field that runs over the end.
    """
    end = len(data) if end is None else end
    while at < end:
        tag, at = varint(data, at)
        number, kind = tag >> 3, tag & 7
        if kind == BYTES:
            size, at = varint(data, at)
        elif kind == VARINT:
            size = varint(data, at)[1] - at
        elif kind in _SIZES:
            size = _SIZES[kind]
        else:
            raise ValueError(f"wire type {kind}")
        yield number, kind, at, at + size
        at += size
    if at != end:
        raise ValueError("a field runs over its end")
