"""Reads and writes MLPerf's sample files in blocks: TFRecord, and HDF5 with rows of fixed or variable length.

Two forms of HDF5 are in use. `fixed` has two-dimensional input_ids, input_mask, segment_ids, masked_lm_positions, masked_lm_ids
and next_sentence_labels. `variable` has one array per sample under the same names, and no mask, as the array's length replaces
it. Masked positions of `fixed` are padded with zeros, as position 0 is [CLS], which is never masked.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from bert_fast.allocator import memory_at_most
from bert_fast.data.formats.table import LONGEST, SampleTable, check, from_padded, segments_of, to_padded
from bert_fast.data.formats.tfrecord import Features, make_example, parse_examples, read_records, write_records
from bert_fast.errors import UserError
from bert_fast.files import atomic_file
from bert_fast.integers import segment_ids, segment_positions

FEATURES = (
    "input_ids",
    "input_mask",
    "segment_ids",
    "masked_lm_positions",
    "masked_lm_ids",
    "masked_lm_weights",
    "next_sentence_labels",
)
_HDF5 = ("input_ids", "segment_ids", "masked_lm_positions", "masked_lm_ids", "next_sentence_labels")
BLOCK = 512  # samples decoded together, a few MiB
_BLOCK_BYTES = 1 << 22  # of TFRecords decoded together
_BLOCK_NUMBERS = BLOCK * 1024  # of an HDF5 table read together
_CHUNK_BYTES = 1 << 25  # of an HDF5 chunk, which is unpacked as a whole
_HDF5_MEMORY = 1 << 28  # that reading a block may take in the library
_GZIP, _SHUFFLE, _CHECKSUM, _LZF = 1, 2, 3, 32000  # HDF5's numbers of filters


def read_blocks(path: str | Path, vocab_size: int) -> Iterator[SampleTable]:
    """Samples of a TFRecord or HDF5 file, which its first bytes tell apart.

    Raises:
        UserError: the file is damaged, lacks a field, or has an invalid sample; the message says which, and how many were good.
    """
    return (read_hdf5 if is_hdf5(path) else read_tfrecord)(path, vocab_size)


def is_hdf5(path: str | Path) -> bool:
    """Whether a file begins as HDF5 does; any other file is read as TFRecord."""
    with open(path, "rb") as file:
        return file.read(8) == b"\x89HDF\r\n\x1a\n"


def read_tfrecord(path: str | Path, vocab_size: int) -> Iterator[SampleTable]:
    """Samples of a TFRecord file, `BLOCK` at a time. See `read_blocks`."""
    first = 0
    for payloads in _blocks(read_records(path)):
        try:
            table = _of_examples(payloads, first)
            check(table, vocab_size, first)
        except ValueError as error:
            raise _damaged(path, error, first) from None
        yield table
        first += len(payloads)


def _blocks(records: Iterator[bytes]) -> Iterator[list[bytes]]:
    """`BLOCK` records at a time, or fewer if they are very long, so that memory is bounded."""
    block: list[bytes] = []
    size = 0
    for record in records:
        block.append(record)
        size += len(record)
        if len(block) == BLOCK or size > _BLOCK_BYTES:
            yield block
            block, size = [], 0
    if block:
        yield block


def _of_examples(payloads: list[bytes], first: int) -> SampleTable:
    try:
        return _table_of(parse_examples(payloads, FEATURES))
    except ValueError as error:
        place, reason = error.args
        raise ValueError(first + place, reason) from None


def _table_of(found: dict[str, Features]) -> SampleTable:
    widths = {name: found[name].width for name in FEATURES}
    _check_widths(widths)
    weights = found["masked_lm_weights"].table() != 0
    counts = np.count_nonzero(weights, axis=1)
    uneven = ((np.arange(weights.shape[1]) < counts[:, None]) != weights).any(axis=1)
    if uneven.any():
        raise ValueError(int(np.flatnonzero(uneven)[0]), "has weights that are not ones followed by zeros")
    lengths, len_a = segments_of(found["input_mask"].table(), found["segment_ids"].table())
    tokens, positions, labels = (
        found[name].first(sizes).astype(np.int64)
        for name, sizes in (("input_ids", lengths), ("masked_lm_positions", counts), ("masked_lm_ids", counts))
    )
    labels_of_pairs = found["next_sentence_labels"].table().ravel().astype(np.int64)
    return SampleTable(tokens, lengths, len_a, positions, labels, counts, labels_of_pairs)


def _check_widths(widths: dict[str, int]) -> None:
    """Refuse fields whose widths do not agree. Raises ValueError(0, reason)."""
    for names, width in (
        (("input_mask", "segment_ids"), widths["input_ids"]),
        (("masked_lm_ids", "masked_lm_weights"), widths["masked_lm_positions"]),
        (("next_sentence_labels",), 1),
    ):
        for name in names:
            if widths.get(name, width) != width:
                raise ValueError(0, f"has {widths[name]} values of {name}, not {width}")


def _damaged(path: str | Path, error: ValueError, good: int) -> UserError:
    place, reason = error.args if len(error.args) == 2 else (good, str(error))
    return UserError(f"{path}: record {place} {reason}; the {place:,} before it are good")


def read_hdf5(path: str | Path, vocab_size: int) -> Iterator[SampleTable]:
    """Samples of an HDF5 file of either form. See `read_blocks`.

    Memory is bounded whatever the file claims: rows have at most 65,535 numbers, chunks at most 32 MiB, and the library may
    allocate 256 MiB per block. Nothing outside of the file is read.
    """
    h5py = _h5py()
    with _library_errors(path, "its beginning"):
        file = h5py.File(path, "r", rdcc_nbytes=_CHUNK_BYTES)
    try:
        with _library_errors(path, "its fields"):
            arrays = _arrays(h5py, file, path)
            fixed, total = _form(h5py, arrays, path)
        size, read = Path(path).stat().st_size, 0
        rows = max(1, min(BLOCK, _BLOCK_NUMBERS // arrays["input_ids"].shape[1])) if fixed else BLOCK
        for first in range(0, total, rows):
            with _library_errors(path, f"near sample {first:,}, reading with at most {_HDF5_MEMORY >> 20} MiB"):
                try:
                    with memory_at_most(_HDF5_MEMORY):
                        table = (_fixed if fixed else _variable)(arrays, slice(first, first + rows), first)
                    check(table, vocab_size, first)
                except ValueError as error:
                    raise _damaged(path, error, first) from None
            read += len(table.tokens)
            if not fixed and read > size:  # such arrays are not compressed, so a token takes at least a byte
                raise UserError(f"{path}: sample {first:,} and others share their numbers; write each of them out")
            yield table
    finally:
        with suppress(Exception):  # a damaged file may not close, either
            file.close()


@contextmanager
def _library_errors(path: str | Path, place: str) -> Iterator[None]:
    """Turn what h5py and HDF5 raise for a damaged file into one line with the file and the place."""
    try:
        yield
    except UserError:
        raise
    except MemoryError:
        raise UserError(
            f"{path}: damaged, or no samples ({place}): that is not enough, and ordinary samples take a few"
        ) from None
    except (
        OSError,
        LookupError,
        RuntimeError,
        TypeError,
        ValueError,
        AttributeError,
        ArithmeticError,
        SystemError,
    ) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0][:160]
        raise UserError(f"{path}: no HDF5 file, or damaged ({place}: {reason})") from None


def _arrays(h5py: Any, file: Any, path: str | Path) -> dict[str, Any]:
    """The arrays of the fields. Raises UserError naming a field that is outside of this file or not of integers."""
    arrays = {}
    for name in (*_HDF5, *(["input_mask"] if file.get("input_mask", getlink=True) is not None else [])):
        link = file.get(name, getlink=True)
        if link is None:
            there = ", ".join(islice(sorted(islice(file, 1000)), 20)) or "none"
            raise UserError(f"{path}: no field {name}; it has {there}")
        if not isinstance(link, h5py.HardLink):
            raise UserError(f"{path}: {name} is a link to {link.path}; copy the array itself into the file (h5copy)")
        if file.get(name, getclass=True) is not h5py.Dataset:
            raise UserError(f"{path}: {name} is a group or a type, not an array")
        array = arrays[name] = file[name]
        if not array.shape:
            raise UserError(f"{path}: {name} is no array of rows")
        kind = h5py.check_vlen_dtype(array.dtype) or array.dtype
        if not isinstance(kind, np.dtype) or kind.kind not in "iub" or kind.shape:
            raise UserError(f"{path}: {name} holds values of type {str(kind)[:80]}, not whole numbers")
        _check_storage(array, f"{path}: {name}")
    return arrays


def _check_storage(array: Any, what: str) -> None:
    """Refuse an array that would unpack to far more than its size, or is in another file. Raises UserError."""
    if any(size > LONGEST for size in array.shape[1:]):
        raise UserError(f"{what} has rows of {max(array.shape[1:]):,} numbers; a sample has at most {LONGEST:,} tokens")
    layout = array.id.get_create_plist()
    if array.is_virtual or layout.get_external_count():
        raise UserError(f"{what} keeps its numbers in other files; copy them into this one (h5repack)")
    filters = [layout.get_filter(index)[0] for index in range(layout.get_nfilters())]
    strange = [number for number in filters if number not in (_GZIP, _SHUFFLE, _CHECKSUM, _LZF)]
    if strange or sum(number in (_GZIP, _LZF) for number in filters) > 1:
        raise UserError(f"{what} is packed with the HDF5 filters {filters}; repack it (h5repack -f GZIP=4)")
    row = max(1, array.id.get_type().get_size()) * math.prod(array.shape[1:])
    if array.chunks is None:
        held = array.id.get_storage_size() // row if row else 0
    else:
        chunk = max(1, array.id.get_type().get_size()) * math.prod(array.chunks)
        if chunk > _CHUNK_BYTES:
            raise UserError(
                f"{what} is stored in chunks of {chunk:,} bytes, and {_CHUNK_BYTES:,} are read at most; repack it with smaller "
                "ones (h5repack -l CHUNK=512x512)"
            )
        held = array.id.get_num_chunks() * array.chunks[0]
    if held < array.shape[0]:
        raise UserError(f"{what} claims {array.shape[0]:,} rows and holds {held:,}")


def _form(h5py: Any, arrays: dict[str, Any], path: str | Path) -> tuple[bool, int]:
    """Whether rows have a fixed length, and how many there are. Raises UserError if the fields do not agree."""
    total = len(arrays["input_ids"])
    uneven = [name for name, array in arrays.items() if len(array) != total]
    if uneven:
        raise UserError(f"{path}: {uneven[0]} has {len(arrays[uneven[0]]):,} rows and input_ids {total:,}")
    labels = arrays["next_sentence_labels"]
    if math.prod(labels.shape) != total or h5py.check_vlen_dtype(labels.dtype):
        raise UserError(f"{path}: next_sentence_labels has not one number a row")
    fixed = arrays["input_ids"].ndim == 2
    if fixed and "input_mask" not in arrays:
        raise UserError(f"{path}: no field input_mask, which rows of one length need")
    names = [name for name in arrays if name != "next_sentence_labels" and (fixed or name != "input_mask")]
    for name in names:
        is_variable = h5py.check_vlen_dtype(arrays[name].dtype) is not None
        if fixed and (arrays[name].ndim != 2 or is_variable):
            raise UserError(f"{path}: {name} is no table of rows of one length, as input_ids is")
        if not fixed and (arrays[name].ndim != 1 or not is_variable):
            raise UserError(f"{path}: {name} has not one array of its own length a row")
    if fixed:
        try:
            _check_widths({name: arrays[name].shape[1] for name in names})
        except ValueError as error:
            raise UserError(f"{path}: {error.args[1].removeprefix('has ')} a row") from None
    return fixed, total


def _fixed(file: Any, rows: slice, first: int) -> SampleTable:
    positions = file["masked_lm_positions"][rows]
    counts = (positions != 0).sum(axis=1)
    return from_padded(
        file["input_ids"][rows],
        file["input_mask"][rows],
        file["segment_ids"][rows],
        positions,
        file["masked_lm_ids"][rows],
        counts,
        file["next_sentence_labels"][rows],
        first,
    )


def _variable(file: Any, rows: slice, first: int) -> SampleTable:
    def column(name: str) -> tuple[np.ndarray, np.ndarray]:
        arrays = file[name][rows]
        return (
            np.concatenate([*arrays, []]).astype(np.int64),
            np.fromiter((len(each) for each in arrays), np.int64, len(arrays)),
        )

    tokens, lengths = column("input_ids")
    segments, segment_lengths = column("segment_ids")
    positions, counts = column("masked_lm_positions")
    labels, label_counts = column("masked_lm_ids")
    for mine, other, name in ((segment_lengths, lengths, "segment_ids"), (label_counts, counts, "masked_lm_ids")):
        if (mine != other).any():
            raise ValueError(
                first + int(np.flatnonzero(mine != other)[0]), f"has {name} of another length than its partner"
            )
    owner = segment_ids(lengths)
    len_a = np.bincount(owner, weights=segments == 0, minlength=len(lengths)).astype(np.int64)
    inside = segment_positions(lengths)
    wrong = (inside >= len_a[owner]) != (segments == 1)
    if wrong.any():
        raise ValueError(
            first + int(owner[np.flatnonzero(wrong)[0]]), "has segments that are not one A followed by one B"
        )
    labels_of_pairs = np.asarray(file["next_sentence_labels"][rows]).ravel().astype(np.int64)
    return SampleTable(tokens, lengths, len_a, positions, labels, counts, labels_of_pairs)


# ---- writing --------------------------------------------------------------------------------------------------------


def write_tfrecord(path: str | Path, blocks: Iterable[SampleTable], width: int, most_masked: int) -> int:
    """Write samples as MLPerf's features, padded to `width` tokens and `most_masked` masks. Returns the number of samples."""

    def payloads() -> Iterator[bytes]:
        for block in blocks:
            rows = to_padded(block, width, most_masked)
            for index in range(len(block)):
                yield make_example({name: values[index] for name, values in rows.items()})

    return write_records(path, payloads())


def write_hdf5(path: str | Path, blocks: Iterable[SampleTable], width: int, most_masked: int, *, variable: bool) -> int:
    """Write samples in one of the two HDF5 forms. Returns the number of samples."""
    h5py = _h5py()
    names = ("input_ids", "segment_ids", "masked_lm_positions", "masked_lm_ids")
    count = 0
    with atomic_file(path) as out, h5py.File(out, "w") as file:
        for block in blocks:
            rows = to_padded(block, width, most_masked)
            columns: dict[str, Any] = {"next_sentence_labels": rows["next_sentence_labels"].astype(np.int8).ravel()}
            if variable:
                for name in names:
                    counts = block.num_masked if "masked" in name else block.lengths
                    cells = np.empty(len(block), object)
                    cells[:] = [row[:n].astype(np.int32) for row, n in zip(rows[name], counts, strict=True)]
                    columns[name] = cells
            else:
                columns |= {name: rows[name].astype(np.int32) for name in names}
                columns["input_mask"] = rows["input_mask"].astype(np.int8)
            for name, values in columns.items():
                _append(h5py, file, name, values, count)
            count += len(block)
    return count


def _append(h5py: Any, file: Any, name: str, values: np.ndarray, count: int) -> None:
    if name not in file:
        kind = h5py.vlen_dtype(np.int32) if values.dtype == object else values.dtype
        shape = values.shape[1:]
        file.create_dataset(name, (0, *shape), kind, maxshape=(None, *shape), chunks=(BLOCK, *shape))
    file[name].resize(count + len(values), axis=0)
    file[name][count:] = values


def _h5py() -> Any:
    try:
        import h5py
    except ImportError:
        raise UserError("HDF5 needs h5py: pip install 'bert_fast[data]'") from None
    return h5py
