"""TFRecord files of tf.train.Example, read and written without TensorFlow.

A record is its length (uint64), the masked CRC32-C of the length, the payload, and the payload's masked CRC32-C, little
endian. An Example is a protobuf message: features (1) > feature (1, repeated map entry) > key (1), value (2) > bytes_list (1),
float_list (2) or int64_list (3) > value (1), packed or not. Python only finds where each feature's bytes lie; the integers of
many examples are decoded together in NumPy.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import google_crc32c
import numpy as np

from bert_fast.errors import UserError
from bert_fast.files import atomic_file
from bert_fast.protobuf import fields

_BLOCK = 1 << 22
_LENGTH = struct.Struct("<Q")
_CRC = struct.Struct("<I")
_LONGEST = 1 << 30  # bytes; a longer record is a damaged length


def masked_crc(data: bytes | memoryview) -> int:
    """TFRecord's CRC32-C: rotated and shifted, so that a CRC of data that holds CRCs is no weaker."""
    crc = google_crc32c.value(bytes(data))
    return (((crc >> 15) | (crc << 17)) + 0xA282EAD8) & 0xFFFFFFFF


def read_records(path: str | Path) -> Iterator[bytes]:
    """Payloads of a file, in order; memory holds one.

    Raises:
        UserError: a CRC does not fit or the file ends in a record; which record, and how many were good.
    """
    good = 0

    def damaged(why: str) -> UserError:
        return UserError(f"{path}: record {good} {why}; the {good:,} before it are good")

    with open(path, "rb", buffering=_BLOCK) as file:
        while head := file.read(12):
            if len(head) < 12:
                raise damaged("is cut short in its head")
            if masked_crc(head[:8]) != _CRC.unpack_from(head, 8)[0]:
                raise damaged("has a length whose checksum does not fit (is this a TFRecord file?)")
            (length,) = _LENGTH.unpack_from(head)
            if length > _LONGEST:
                raise damaged(f"claims {length:,} bytes")
            payload, tail = file.read(length), file.read(4)
            if len(payload) < length or len(tail) < 4:
                raise damaged("is cut short")
            if masked_crc(payload) != _CRC.unpack(tail)[0]:
                raise damaged("has a checksum that does not fit")
            yield payload
            good += 1


def write_records(path: str | Path, payloads: Iterable[bytes]) -> int:
    """Write a file, whole or not at all. Returns the number of records."""
    count = 0
    with atomic_file(path) as file:
        for payload in payloads:
            head = _LENGTH.pack(len(payload))
            file.write(head + _CRC.pack(masked_crc(head)) + payload + _CRC.pack(masked_crc(payload)))
            count += 1
    return count


# ---- protobuf -------------------------------------------------------------------------------------------------------


def _find(data: bytes) -> dict[str, tuple[int, bytes]]:
    """Kind (1 bytes, 2 floats, 3 integers) and packed values of every feature of an Example."""
    found: dict[str, tuple[int, bytes]] = {}
    for number, kind, begin, end in fields(data, 0, len(data)):
        if (number, kind) != (1, 2):
            continue
        for entry, entry_kind, entry_begin, entry_end in fields(data, begin, end):
            if (entry, entry_kind) != (1, 2):
                continue
            name, value = "", (0, 0)
            for part, _, part_begin, part_end in fields(data, entry_begin, entry_end):
                if part == 1:
                    name = data[part_begin:part_end].decode()
                elif part == 2:
                    value = (part_begin, part_end)
            for form, _, form_begin, form_end in fields(data, *value):
                values = [data[a:b] for field, _, a, b in fields(data, form_begin, form_end) if field == 1]
                found[name] = (form, values[0] if len(values) == 1 else b"".join(values))
    return found


def decode_varints(data: bytes) -> np.ndarray:
    """Non-negative varints one after the other, int64 [count]. Raises ValueError if the last is cut or one is too long."""
    raw = np.frombuffer(data, np.uint8)
    if not len(raw):
        return np.zeros(0, np.int64)
    if (raw < 0x80).all():
        return raw.astype(np.int64)
    if raw[-1] >= 0x80:
        raise ValueError("the last integer is cut short")
    ends = np.flatnonzero(raw < 0x80)
    starts = np.concatenate([[0], ends[:-1] + 1])
    sizes = ends - starts + 1
    if sizes.max() > 9:  # ten bytes are a negative number
        raise ValueError("an integer is negative or damaged")
    values = np.zeros(len(ends), np.int64)
    for byte in range(int(sizes.max())):
        longer = sizes > byte
        values[longer] |= (raw[starts[longer] + byte].astype(np.int64) & 0x7F) << (7 * byte)
    return values


class Features:
    """Features of several examples: flat values and where each example's begin, `offsets` [examples + 1]."""

    def __init__(self, values: np.ndarray, offsets: np.ndarray) -> None:
        self.values, self.offsets = values, offsets

    def table(self) -> np.ndarray:
        """[examples, length] where all examples have as many values. Raises ValueError where not."""
        sizes = np.diff(self.offsets)
        if len(sizes) and (sizes != sizes[0]).any():
            raise ValueError("examples differ in length")
        return self.values.reshape(len(sizes), -1)


def parse_examples(payloads: Sequence[bytes], names: Sequence[str]) -> dict[str, Features]:
    """Integer and float features of examples.

    Raises:
        ValueError: a feature is missing or damaged; the place in `payloads` is the first argument, the reason the second.
    """
    pieces: dict[str, list[bytes]] = {name: [] for name in names}
    floats: set[str] = set()
    for place, payload in enumerate(payloads):
        try:
            found = _find(payload)
        except (ValueError, IndexError, UnicodeDecodeError) as error:
            raise ValueError(place, f"is no tf.train.Example ({error})") from None
        for name in names:
            if name not in found:
                raise ValueError(place, f"has no feature {name}; it has {', '.join(sorted(found)) or 'none'}")
            form, data = found[name]
            if form == 2:
                floats.add(name)
            elif form != 3:
                raise ValueError(place, f"feature {name} holds bytes, not numbers")
            pieces[name].append(data)
    return {name: _decode(pieces[name], name, name in floats) for name in names}


def _decode(pieces: list[bytes], name: str, is_float: bool) -> Features:
    data = b"".join(pieces)
    edges = np.concatenate([[0], np.cumsum([len(piece) for piece in pieces])]).astype(np.int64)
    if is_float:
        if (edges % 4).any():
            raise ValueError(0, f"feature {name} is damaged")
        return Features(np.frombuffer(data, "<f4"), edges // 4)
    try:
        values = decode_varints(data)
    except ValueError as error:
        raise ValueError(0, f"feature {name}: {error}") from None
    raw = np.frombuffer(data, np.uint8)
    complete = np.concatenate([[0], np.cumsum(raw < 0x80)])  # integers that end before a byte
    return Features(values, complete[edges])


def _encode_varint(value: int) -> bytes:
    out = bytearray()
    while value >= 0x80:
        out.append((value & 0x7F) | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def _message(number: int, content: bytes) -> bytes:
    return _encode_varint(number << 3 | 2) + _encode_varint(len(content)) + content


def encode_varints(values: np.ndarray) -> bytes:
    """The inverse of `decode_varints` for values below 2^21."""
    values = np.asarray(values, np.int64)
    if (values < 0x80).all():
        return values.astype(np.uint8).tobytes()
    sizes = 1 + (values >= 1 << 7) + (values >= 1 << 14)
    ends = np.cumsum(sizes)
    out = np.zeros(int(ends[-1]), np.uint8)
    for byte in range(3):
        longer = sizes > byte
        part = (values[longer] >> (7 * byte)) & 0x7F
        out[(ends - sizes)[longer] + byte] = part | np.where(sizes[longer] > byte + 1, 0x80, 0)
    return out.tobytes()


def make_example(features: dict[str, np.ndarray]) -> bytes:
    """An Example; arrays of floats become a float_list, others an int64_list. Keys in sorted order."""
    entries = []
    for name in sorted(features):
        values = features[name]
        if values.dtype.kind == "f":
            feature = _message(2, _message(1, values.astype("<f4").tobytes()))
        else:
            feature = _message(3, _message(1, encode_varints(values)))
        entries.append(_message(1, _message(1, name.encode()) + _message(2, feature)))
    return _message(1, b"".join(entries))
