"""TensorFlow checkpoints (format V2: PREFIX.index, PREFIX.data-00000-of-00001), read without TensorFlow.

The index is a sorted table of blocks (LevelDB's format): the footer points to an index block, that to data blocks, whose
entries share prefixes of their keys. The value of key "" is a BundleHeaderProto, all others are BundleEntryProtos: dtype,
shape, shard, offset, size, masked CRC32-C of the bytes. Tensors lie raw, little endian, in the data shards.
"""

from __future__ import annotations

import math
import os
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from bert_fast.errors import UserError
from bert_fast.foreign import open_regular, read_bounded, shown
from bert_fast.protobuf import BYTES, FIXED32, VARINT, fields, varint

_FOOTER, _MAGIC = 48, 0xDB4775248B80FB57
_MOST_INDEX_BYTES = 16 << 20  # BERT-large with its optimizer's slots has 0.1 MB
_MOST_RANK = 32
_FLOATS = {1: "F32", 2: "F64", 14: "BF16", 19: "F16"}
_TYPES: dict[int, str] = {1: "<f4", 2: "<f8", 3: "<i4", 4: "u1", 6: "i1", 9: "<i8", 10: "?", 14: "bfloat16", 19: "<f2"}


@dataclass(frozen=True)
class Entry:
    """Where a tensor lies: TensorFlow's number of its type, its shape, and its shard, offset and size in bytes."""

    kind: int
    shape: tuple[int, ...]
    shard: int
    offset: int
    size: int
    crc: int  # masked CRC32-C of the bytes, 0 if the checkpoint has none


def is_bundle(prefix: str | Path) -> bool:
    """Whether `prefix` names a checkpoint: PREFIX.index is there."""
    return Path(f"{prefix}.index").is_file()


class TensorBundle:
    """A checkpoint's tensors by name; each is read only when asked for."""

    def __init__(self, prefix: str | Path) -> None:
        """Open PREFIX.index. Raises UserError if it is missing or damaged."""
        self.prefix = str(prefix)
        path = Path(f"{prefix}.index")
        try:
            data = read_bounded(path, _MOST_INDEX_BYTES, "a checkpoint's index")
        except FileNotFoundError as error:
            raise UserError(f"checkpoint {shown(path)}: {error.strerror}") from None
        try:
            self.entries, self._shards = _read_index(data)
        except (ValueError, IndexError, struct.error) as error:
            raise UserError(
                f"checkpoint {shown(path)} is no index of a TensorFlow checkpoint, or damaged ({shown(error)})"
            ) from None

    def kind(self, name: str) -> str | None:
        """The number format of a floating-point tensor: F64, F32, F16 or BF16. None for other types."""
        return _FLOATS.get(self.entries[name].kind)

    def __contains__(self, name: object) -> bool:
        return name in self.entries

    def __getitem__(self, name: str) -> np.ndarray:
        """A tensor, float types as float32. Raises UserError if it is missing, cut short or of an unsupported type."""
        entry = self.entries.get(name)
        if entry is None:
            raise UserError(f"checkpoint {self.prefix} has no tensor {name}")
        if entry.kind not in _TYPES:
            raise UserError(
                f"checkpoint {self.prefix}: {shown(name)} is of TensorFlow's type {entry.kind}, which is not read"
            )
        kind = _TYPES[entry.kind]
        path = Path(f"{self.prefix}.data-{entry.shard:05d}-of-{self._shards:05d}")
        wanted = math.prod(entry.shape) * (2 if kind == "bfloat16" else np.dtype(kind).itemsize)
        if wanted != entry.size or len(entry.shape) > _MOST_RANK:
            raise UserError(
                f"checkpoint {path}: {shown(name)} has {entry.size:,} bytes and shape {shown(list(entry.shape))}; "
                "fetch it again"
            )
        try:
            with os.fdopen(open_regular(path), "rb") as file:
                if entry.offset + entry.size > os.fstat(file.fileno()).st_size:
                    raise UserError(f"checkpoint {path} is cut short: {shown(name)} ends beyond it")
                file.seek(entry.offset)
                data = file.read(entry.size)
        except OSError as error:
            raise UserError(f"checkpoint {path}: {error.strerror}") from None
        if not _has_crc(data, entry.crc):
            raise UserError(f"checkpoint {path} is damaged: the checksum of {shown(name)} does not fit; fetch it again")
        if kind == "bfloat16":
            values = (np.frombuffer(data, "<u2").astype(np.uint32) << 16).view(np.float32)
        else:
            values = np.frombuffer(data, kind)
        values = values.reshape(entry.shape)
        return values.astype(np.float32) if values.dtype.kind == "f" else values.copy()


def _read_index(data: bytes) -> tuple[dict[str, Entry], int]:
    if len(data) < _FOOTER or struct.unpack("<Q", data[-8:])[0] != _MAGIC:
        raise ValueError("its last bytes are not a table's")
    _, at = _handle(data, len(data) - _FOOTER)  # of the meta index, which is not needed
    index, _ = _handle(data, at)
    entries: dict[str, Entry] = {}
    shards, read, named = 1, 0, 0
    for _, value in _block(data, *index):
        block = _handle(value, 0)[0]
        read += block[1]
        if read > len(data):
            raise ValueError("its blocks overlap")
        for key, proto in _block(data, *block):
            named += len(key)
            if named > _MOST_INDEX_BYTES:
                raise ValueError(f"its names have more than {_MOST_INDEX_BYTES >> 20} MiB")
            if key == b"":
                shards = _number(proto, 1, 1)
            else:
                entries[key.decode()] = _entry(proto)
    return entries, shards


def _handle(data: bytes, at: int) -> tuple[tuple[int, int], int]:
    """Offset and size of a block, and the index of the byte after the handle."""
    offset, at = varint(data, at)
    size, at = varint(data, at)
    return (offset, size), at


def _block(data: bytes, offset: int, size: int) -> Iterator[tuple[bytes, bytes]]:
    """Keys and values of a block."""
    if offset + size >= len(data):
        raise ValueError("a block runs over the end")
    if data[offset + size] != 0:
        raise ValueError("a block is compressed")
    block = data[offset : offset + size]
    (restarts,) = struct.unpack("<I", block[-4:])
    end, at, key = size - 4 * (restarts + 1), 0, b""
    if end < 0:
        raise ValueError("a block is shorter than its table of restarts")
    while at < end:
        shared, at = varint(block, at)
        fresh, at = varint(block, at)
        length, at = varint(block, at)
        if shared > len(key) or at + fresh + length > end:
            raise ValueError("an entry runs over its block")
        key = key[:shared] + block[at : at + fresh]
        at += fresh
        yield key, block[at : at + length]
        at += length


def _number(proto: bytes, field: int, default: int) -> int:
    """The number in a field of a message, or `default` where it has no such field."""
    return next(
        (varint(proto, begin)[0] for found, kind, begin, _ in fields(proto) if (found, kind) == (field, VARINT)),
        default,
    )


def _entry(proto: bytes) -> Entry:
    shape: list[int] = []
    for field, kind, begin, end in fields(proto):
        if (field, kind) == (2, BYTES):
            shape += [
                _number(proto[a:b], 1, 0)
                for part, form, a, b in fields(proto, begin, end)
                if (part, form) == (2, BYTES)
            ]
    kind, shard, offset, size = (_number(proto, field, 0) for field in (1, 3, 4, 5))
    places = (begin for field, form, begin, _ in fields(proto) if (field, form) == (6, FIXED32))
    crc = next((struct.unpack_from("<I", proto, begin)[0] for begin in places), 0)
    if max(*shape, shard, offset, size, 0) >= 1 << 63:  # negative, as protobuf writes it
        raise ValueError("a number is below 0")
    return Entry(kind, tuple(shape), shard, offset, size, crc)


def _has_crc(data: bytes, masked: int) -> bool:
    """Whether the bytes have this checksum. True for 0 (no checksum), and without the package that computes it."""
    try:
        from bert_fast.crc32c import masked_crc32c
    except ModuleNotFoundError:
        return True
    return masked in (0, masked_crc32c(data))
