"""TFRecord files of tf.train.Example, read and written without TensorFlow.

A record is its length (uint64), the masked CRC32-C of the length, the payload, and the payload's masked CRC32-C, little
endian. An Example is a protobuf message: features (1) > feature (1, repeated map entry) > key (1), value (2) > bytes_list (1),
float_list (2) or int64_list (3) > value (1), packed or not. Python only finds where each feature's bytes are; NumPy decodes
the integers of many examples together.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np

from bert_fast.crc32c import masked_crc32c
from bert_fast.data.formats.locate import FLOATS, locate
from bert_fast.errors import UserError
from bert_fast.files import atomic_file
from bert_fast.protobuf import fields

BLOCK_BYTES = 1 << 20  # of a file, read at once
_HEAD, _LENGTH = struct.Struct("<QI"), struct.Struct("<Q")
_CRC = struct.Struct("<I")
_HEADS = 1 << 16  # heads of different lengths that are remembered as checked
# Bytes of a record: a sample of 65,535 tokens, the longest that a store holds, takes less than 1 MiB
_LONGEST = 1 << 24


def read_records(path: str | Path, block_bytes: int = BLOCK_BYTES) -> Iterator[bytes]:
    """Payloads of a file in order; memory holds one at a time.

    Args:
        block_bytes: bytes of the file that are read at once, or as many as one record has, if those are more.

    Raises:
        UserError: a CRC is wrong or the file ends inside of a record; the message says which, and how many were good.
    """
    good, sound_heads = 0, set[bytes]()  # lengths recur: each is checked once

    def damaged(why: str) -> UserError:
        return UserError(f"{path}: record {good} {why}; the {good:,} before it are good")

    with open(path, "rb") as file:
        block, at = b"", 0
        while True:
            if len(block) - at < 12:
                block, at = block[at:] + file.read(max(block_bytes, 12)), 0
                if not block:
                    return
                if len(block) < 12:
                    raise damaged("is cut short in its head")
            head = block[at : at + 12]
            length, length_crc = _HEAD.unpack(head)
            if head not in sound_heads:
                if masked_crc32c(head[:8]) != length_crc:
                    raise damaged("has a length whose checksum does not fit (is this a TFRecord file?)")
                if length > _LONGEST:
                    raise damaged(f"claims {length:,} bytes, and no sample takes more than {_LONGEST:,}")
                if len(sound_heads) < _HEADS:
                    sound_heads.add(head)
            if len(block) - at < length + 16:
                block, at = block[at:] + file.read(max(block_bytes, length + 16)), 0
                if len(block) < length + 16:
                    raise damaged("is cut short")
            at += 12
            payload = block[at : at + length]
            if masked_crc32c(payload) != _CRC.unpack_from(block, at + length)[0]:
                raise damaged("has a checksum that does not fit")
            yield payload
            good += 1
            at += length + 4


def write_records(path: str | Path, payloads: Iterable[bytes]) -> int:
    """Write a whole file or nothing. Returns the number of records. Raises UserError as `atomic_file`."""
    count = 0
    with atomic_file(path) as file:
        for payload in payloads:
            head = _LENGTH.pack(len(payload))
            file.write(head + _CRC.pack(masked_crc32c(head)) + payload + _CRC.pack(masked_crc32c(payload)))
            count += 1
    return count


# ---- protobuf -------------------------------------------------------------------------------------------------------


def _find(data: bytes) -> dict[str, tuple[int, bytes]]:
    """Kind (1 bytes, 2 floats, 3 integers) and packed values of each feature of an Example."""
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


def decode_varints(data: bytes) -> tuple[np.ndarray, np.ndarray | None]:
    """Decode non-negative varints that lie end to end; returns values and the index of each one's last byte.

    Returns:
        (uint8 [count], None) if each has one byte, else (uint32 or int64 [count], int64 [count]).

    Raises:
        ValueError: the last one is cut short, or one is negative.
    """
    raw = np.frombuffer(data, np.uint8)
    more = raw >= 0x80
    if not more.any():
        return raw, None
    if more[-1]:
        raise ValueError("the last integer is cut short")
    ends = np.flatnonzero(~more)
    behind_last = np.empty_like(ends)  # bytes of a varint before its last
    behind_last[0] = ends[0]
    np.subtract(ends[1:], ends[:-1] + 1, out=behind_last[1:])
    most = int(behind_last.max())
    if most > 8:  # ten bytes are a negative number
        raise ValueError("an integer is negative or damaged")
    padded = np.frombuffer(bytes(most) + data, np.uint8)
    values = raw.take(ends).astype(np.uint32 if most <= 2 else np.int64)
    for byte in range(1, most + 1):  # from the last byte, the highest bits, to the first
        longer = behind_last >= byte
        np.left_shift(values, 7 * longer.view(np.uint8), out=values)
        np.bitwise_or(values, (padded[most - byte :].take(ends) & 0x7F) * longer, out=values)
    return values, ends


class Features:
    """A feature of n examples, without the zeros that end an example's values (padding), which are only counted.

    Attributes:
        values: of all examples, end to end; uint8, uint32, int64 or float32.
        num_values: how many of `values` each example has, int64 [n].
        num_zeros: how many zeros follow these, int64 [n].
    """

    def __init__(self, name: str, values: np.ndarray, offsets: np.ndarray, num_zeros: np.ndarray) -> None:
        """`offsets`: where the values of each example begin, and where the last ones end, int64 [n + 1]."""
        self.values = values
        self.num_values, self.num_zeros = np.diff(offsets), num_zeros
        self._name = name

    @property
    def width(self) -> int:
        """Number of values per example. Raises ValueError(index, reason) if examples differ."""
        sizes = self.num_values + self.num_zeros
        odd = np.flatnonzero(sizes != sizes[0])
        if len(odd):
            raise ValueError(int(odd[0]), f"feature {self._name} has another length than in its neighbours")
        return int(sizes[0])

    def table(self) -> np.ndarray:
        """The values as [examples, width]. Raises ValueError(index, reason) if examples differ in length."""
        width = self.width
        if not self.num_zeros.any():
            return self.values.reshape(-1, width)
        rows = np.zeros((len(self.num_values), width), self.values.dtype)
        rows[np.arange(width) < self.num_values[:, None]] = self.values
        return rows

    def first(self, counts: np.ndarray) -> np.ndarray:
        """The first counts[i] values of every example, end to end. Raises ValueError as `table`."""
        width = self.width
        if np.array_equal(self.num_values, counts):
            return self.values
        return self.table()[np.arange(width) < counts[:, None]]


def parse_examples(payloads: Sequence[bytes], names: Sequence[str]) -> dict[str, Features]:
    """Integer and float features of examples, by name.

    Raises:
        ValueError: (index in `payloads`, reason) of an example with a missing or damaged feature.
    """
    joined = b"".join([*payloads, bytes(64)])
    edges = np.concatenate([[0], np.cumsum([len(payload) for payload in payloads])]).astype(np.int64)
    data = np.frombuffer(joined, np.uint8)
    places = locate(data, edges[:-1], edges[1:], names)
    if places is not None:
        return {name: _at_places(joined, data, name, *place) for name, place in places.items()}
    return parse_one_by_one(payloads, names)


def parse_one_by_one(payloads: Sequence[bytes], names: Sequence[str]) -> dict[str, Features]:
    """As `parse_examples`, which calls it for examples of an unusual form: reads one after the other, and is slower."""
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


def _at_places(joined: bytes, data: np.ndarray, name: str, form: int, begins: np.ndarray, ends: np.ndarray) -> Features:
    """A feature whose values are at known places of `joined`; `data` is a view of the same bytes."""
    size = int(ends[0] - begins[0])
    if (
        size and (ends - begins == size).all()
    ):  # zeros and ones, or floats, have rows of one size that are copied as a whole
        rows = np.lib.stride_tricks.sliding_window_view(data, size)[begins]
        offsets = np.arange(len(begins) + 1)
        if form == FLOATS and size % 4 == 0:
            return Features(name, rows.view("<f4").ravel(), offsets * (size // 4), np.zeros(len(begins), np.int64))
        if form != FLOATS and not (rows & 0x80).any():
            return Features(name, rows.ravel(), offsets * size, np.zeros(len(begins), np.int64))
    pieces = [joined[a:b] for a, b in zip(begins.tolist(), ends.tolist(), strict=True)]
    return _decode(pieces, name, form == FLOATS)


def _decode(pieces: list[bytes], name: str, is_float: bool) -> Features:
    sizes = np.fromiter(map(len, pieces), np.int64, len(pieces))
    if not is_float:
        pieces = [piece.rstrip(b"\0") for piece in pieces]  # padding: a zero is one byte
        torn = [place for place, piece in enumerate(pieces) if piece and piece[-1] >= 0x80]
        for place in torn:
            if len(pieces[place]) == sizes[place]:
                raise ValueError(place, f"feature {name}: the last integer is cut short")
            pieces[place] += b"\0"  # it belongs to an integer of more bytes than it needs
    kept = np.fromiter(map(len, pieces), np.int64, len(pieces))
    edges = np.concatenate([[0], np.cumsum(kept)])
    data = b"".join(pieces)
    if is_float:
        if (kept % 4).any():
            raise ValueError(int(np.flatnonzero(kept % 4)[0]), f"feature {name} is damaged")
        return Features(name, np.frombuffer(data, "<f4"), edges // 4, np.zeros_like(sizes))
    try:
        values, ends = decode_varints(data)
    except ValueError:
        raise _first_damaged(pieces, name) from None
    offsets = edges if ends is None else np.searchsorted(ends, edges)
    return Features(name, values, offsets, sizes - kept)


def _first_damaged(pieces: list[bytes], name: str) -> ValueError:
    for place, piece in enumerate(pieces):
        try:
            decode_varints(piece)
        except ValueError as error:
            return ValueError(place, f"feature {name}: {error}")
    raise AssertionError("whole varints, one after the other, are whole")


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
    """A serialized Example with sorted keys; float arrays become a float_list, others an int64_list."""
    entries = []
    for name in sorted(features):
        values = features[name]
        if values.dtype.kind == "f":
            feature = _message(2, _message(1, values.astype("<f4").tobytes()))
        else:
            feature = _message(3, _message(1, encode_varints(values)))
        entries.append(_message(1, _message(1, name.encode()) + _message(2, feature)))
    return _message(1, b"".join(entries))
