"""MLPerf's sample files as blocks of samples, and back: TFRecord, and HDF5 with rows of one length or of their own.

HDF5 in use: `fixed` has two-dimensional input_ids, input_mask, segment_ids, masked_lm_positions, masked_lm_ids and
next_sentence_labels; `variable` has one array a sample in the same names, without a mask (its length says it). Masked positions
of `fixed` are padded with zeros, and position 0 is [CLS], which is never masked.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from bert_fast.data.formats.table import SampleTable, check, from_padded, segments_of, to_padded
from bert_fast.data.formats.tfrecord import Features, make_example, parse_examples, read_records, write_records
from bert_fast.errors import UserError
from bert_fast.files import atomic_file

FEATURES = (
    "input_ids", "input_mask", "segment_ids", "masked_lm_positions", "masked_lm_ids", "masked_lm_weights",
    "next_sentence_labels",
)  # fmt: skip
_HDF5 = ("input_ids", "segment_ids", "masked_lm_positions", "masked_lm_ids", "next_sentence_labels")
BLOCK = 512  # samples decoded together: a few MiB


def read_blocks(path: str | Path, vocab_size: int) -> Iterator[SampleTable]:
    """Samples of a file of either kind, told by its first bytes.

    Raises:
        UserError: the file is damaged, lacks a field, or holds something that is no sample; which, and how many were good.
    """
    return (read_hdf5 if is_hdf5(path) else read_tfrecord)(path, vocab_size)


def is_hdf5(path: str | Path) -> bool:
    """Whether a file begins as HDF5 does; what does not is taken for TFRecord."""
    with open(path, "rb") as file:
        return file.read(8) == b"\x89HDF\r\n\x1a\n"


def read_tfrecord(path: str | Path, vocab_size: int) -> Iterator[SampleTable]:
    """Samples of a TFRecord file, `BLOCK` at a time. See `read_blocks`."""
    records, first = read_records(path), 0
    while payloads := list(islice(records, BLOCK)):
        try:
            table = _of_examples(payloads, first)
            check(table, vocab_size, first)
        except ValueError as error:
            raise _damaged(path, error, first) from None
        yield table
        first += len(payloads)


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
    """Refuse fields that do not belong together. Raises ValueError(0, reason)."""
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
    """Samples of an HDF5 file of either form. See `read_blocks`."""
    h5py = _h5py()
    try:
        file = h5py.File(path, "r")
    except OSError as error:
        raise UserError(f"{path}: no HDF5 file, or damaged ({str(error).splitlines()[0][:120]})") from None
    with file:
        missing = [name for name in _HDF5 if name not in file]
        if missing:
            raise UserError(f"{path}: no field {missing[0]}; it has {', '.join(sorted(file)) or 'none'}")
        scalar = [name for name in _HDF5 if not getattr(file[name], "ndim", 0)]
        if scalar:
            raise UserError(f"{path}: {scalar[0]} is no array of rows")
        total = len(file["input_ids"])
        uneven = [name for name in _HDF5 if len(file[name]) != total]
        if uneven:
            raise UserError(f"{path}: {uneven[0]} has {len(file[uneven[0]]):,} rows and input_ids {total:,}")
        fixed = file["input_ids"].ndim == 2
        if fixed and "input_mask" not in file:
            raise UserError(f"{path}: no field input_mask, which rows of one length need")
        if fixed:
            names = ("input_ids", "input_mask", "segment_ids", "masked_lm_positions", "masked_lm_ids")
            flat = [name for name in names if file[name].ndim != 2]
            if flat:
                raise UserError(f"{path}: {flat[0]} is no table of rows of one length, as input_ids is")
            try:
                _check_widths({name: file[name].shape[1] for name in names})
            except ValueError as error:
                raise UserError(f"{path}: {error.args[1].removeprefix('has ')} a row") from None
        for first in range(0, total, BLOCK):
            try:
                table = (_fixed if fixed else _variable)(file, slice(first, first + BLOCK), first)
                check(table, vocab_size, first)
            except OSError as error:
                raise UserError(f"{path}: damaged near sample {first:,} ({str(error)[:120]})") from None
            except ValueError as error:
                raise _damaged(path, error, first) from None
            yield table


def _fixed(file: Any, rows: slice, first: int) -> SampleTable:
    positions = file["masked_lm_positions"][rows]
    counts = (positions != 0).sum(axis=1)
    return from_padded(
        file["input_ids"][rows], file["input_mask"][rows], file["segment_ids"][rows], positions,
        file["masked_lm_ids"][rows], counts, file["next_sentence_labels"][rows], first,
    )  # fmt: skip


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
    owner = np.repeat(np.arange(len(lengths)), lengths)
    len_a = np.bincount(owner, weights=segments == 0, minlength=len(lengths)).astype(np.int64)
    inside = np.arange(len(tokens)) - np.repeat(np.cumsum(lengths) - lengths, lengths)
    wrong = (inside >= len_a[owner]) != (segments == 1)
    if wrong.any():
        raise ValueError(
            first + int(owner[np.flatnonzero(wrong)[0]]), "has segments that are not one A followed by one B"
        )
    labels_of_pairs = np.asarray(file["next_sentence_labels"][rows]).ravel().astype(np.int64)
    return SampleTable(tokens, lengths, len_a, positions, labels, counts, labels_of_pairs)


# ---- writing --------------------------------------------------------------------------------------------------------


def write_tfrecord(path: str | Path, blocks: Iterable[SampleTable], width: int, most_masked: int) -> int:
    """Write samples as MLPerf's features, padded to `width` tokens and `most_masked` masks. Returns their number."""

    def payloads() -> Iterator[bytes]:
        for block in blocks:
            rows = to_padded(block, width, most_masked)
            for index in range(len(block)):
                yield make_example({name: values[index] for name, values in rows.items()})

    return write_records(path, payloads())


def write_hdf5(path: str | Path, blocks: Iterable[SampleTable], width: int, most_masked: int, *, variable: bool) -> int:
    """Write samples in one of the two HDF5 forms. Returns their number."""
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
