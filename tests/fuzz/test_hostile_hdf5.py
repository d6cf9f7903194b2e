"""HDF5 files that claim, link or unpack to more than they are: one line each, in little memory."""

from __future__ import annotations

import resource
import struct
import time
import zlib
from collections.abc import Callable
from pathlib import Path

import h5py
import numpy as np
import pytest

from bert_fast.data.formats.mlperf import read_hdf5
from bert_fast.errors import UserError

NAMES = ("input_ids", "segment_ids", "masked_lm_positions", "masked_lm_ids")
ROWS, WIDTH, MASKS, VOCAB = 40, 32, 4, 100


def write(path: Path, variable: bool = False) -> Path:
    """A file of 40 good samples."""
    ids = np.full((ROWS, WIDTH), 7, np.int32)
    segments = np.repeat([[0] * 16 + [1] * 16], ROWS, 0).astype(np.int32)
    positions = np.repeat([[1, 3, 5, 9]], ROWS, 0).astype(np.int32)
    with h5py.File(path, "w") as file:
        file["next_sentence_labels"] = np.zeros(ROWS, np.int8)
        for name, values in zip(NAMES, (ids, segments, positions, positions), strict=True):
            if variable:
                cells = np.empty(ROWS, object)
                cells[:] = list(values)
                file.create_dataset(name, data=cells, dtype=h5py.vlen_dtype(np.int32))
            else:
                file.create_dataset(name, data=values, chunks=(8, values.shape[1]), compression="gzip")
        if not variable:
            file["input_mask"] = np.ones((ROWS, WIDTH), np.int8)
    return path


def replaced(name: str, make: Callable[[h5py.File], object]) -> Callable[[h5py.File], None]:
    def change(file: h5py.File) -> None:
        del file[name]
        make(file)

    return change


def with_bomb(file: h5py.File) -> None:
    """A chunk whose few hundred kilobytes inflate to 400 MB, far beyond the size that the chunk claims."""
    pack = zlib.compressobj(1)
    bomb = b"".join([*(pack.compress(bytes(1 << 20)) for _ in range(400)), pack.flush()])
    file["input_ids"].id.write_direct_chunk((0, 0), bomb)


def linked(link: object) -> Callable[[h5py.File], None]:
    return replaced("input_ids", lambda file: file.__setitem__("input_ids", link))


def filled(**options: object) -> Callable[[h5py.File], None]:
    return replaced("input_ids", lambda file: file.create_dataset("input_ids", **options))  # type: ignore[arg-type]


FIXED: dict[str, tuple[Callable[[h5py.File], None], str]] = {
    "dangling link": (linked(h5py.SoftLink("/nowhere")), "input_ids is a link to /nowhere"),
    "looping link": (linked(h5py.SoftLink("/input_ids")), "input_ids is a link to"),
    "external link": (linked(h5py.ExternalLink("other.h5", "/x")), "input_ids is a link to"),
    "group": (replaced("input_ids", lambda f: f.create_group("input_ids")), "is a group or a type"),
    "type": (linked(np.dtype("i4")), "is a group or a type"),
    "scalar": (filled(data=3), "no array of rows"),
    "empty": (filled(dtype="i4", shape=None, data=h5py.Empty("i4")), "no array of rows"),
    "NaN": (filled(data=np.full((ROWS, WIDTH), np.nan)), "float64, not whole numbers"),
    "text": (filled(data=[["a"] * WIDTH] * ROWS), "not whole numbers"),
    "compound": (filled(data=np.zeros((ROWS, WIDTH), "i4,i4")), "not whole numbers"),
    "references": (filled(shape=(ROWS, WIDTH), dtype=h5py.ref_dtype), "not whole numbers"),
    "2^40 columns": (
        filled(shape=(ROWS, 2**40), dtype="i4", chunks=(1, 512)), "rows of 1,099,511,627,776 numbers; .* 65,535"
    ),
    "2^40 rows": (filled(shape=(2**40, WIDTH), dtype="i4", chunks=(8, WIDTH)), "claims 1,099,511,627,776 rows and holds 0"),
    "contiguous, not written": (filled(shape=(2**40, WIDTH), dtype="i4"), "claims 1,099,511,627,776 rows"),
    "huge chunks": (
        filled(shape=(2**22, WIDTH), dtype="i4", chunks=(2**22, WIDTH), compression="gzip"), "chunks of 536,870,912 bytes"
    ),
    "bomb": (with_bomb, "near sample 0, reading with at most 256 MiB"),
    "three dimensions": (filled(data=np.zeros((ROWS, WIDTH, 2), "i4")), "no table of rows|one array"),
    "variable rows among fixed": (
        replaced("segment_ids", lambda f: f.create_dataset("segment_ids", (ROWS,), h5py.vlen_dtype(np.int32))),
        "no table of rows|claims",
    ),
    "label tables": (
        replaced("next_sentence_labels", lambda f: f.create_dataset("next_sentence_labels", data=np.zeros((ROWS, 9), "i1"))),
        "not one number a row",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", FIXED)
def test_fixed_rows(tmp_path: Path, name: str) -> None:
    change, message = FIXED[name]
    path = write(tmp_path / "part.hdf5")
    assert sum(map(len, read_hdf5(path, VOCAB))) == ROWS
    with h5py.File(path, "a") as file:
        change(file)
    before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.monotonic()
    with pytest.raises(UserError, match=f"^{path}: .*({message})") as caught:
        list(read_hdf5(path, VOCAB))
    assert "\n" not in str(caught.value)
    assert time.monotonic() - start < 10
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 600 * 1024  # KiB


def test_virtual_rows_of_another_file(tmp_path: Path) -> None:
    write(tmp_path / "other.hdf5")
    path = write(tmp_path / "part.hdf5")
    layout = h5py.VirtualLayout((ROWS, WIDTH), "i4")
    layout[:] = h5py.VirtualSource(tmp_path / "other.hdf5", "input_ids", (ROWS, WIDTH))
    with h5py.File(path, "a") as file:
        del file["input_ids"]
        file.create_virtual_dataset("input_ids", layout)
    with pytest.raises(UserError, match="input_ids keeps its numbers in other files"):
        list(read_hdf5(path, VOCAB))


@pytest.mark.parametrize("length", [2**32 - 1, 2**28, 2**17])
def test_variable_row_of_a_claimed_length(tmp_path: Path, length: int) -> None:
    """A reference of 16 bytes, whose first four say how long the row is."""
    path = write(tmp_path / "part.hdf5", variable=True)
    with h5py.File(path, "r") as file:
        at = file["input_ids"].id.get_offset()
    data = bytearray(path.read_bytes())
    assert struct.unpack_from("<I", data, at)[0] == WIDTH
    struct.pack_into("<I", data, at, length)
    path.write_bytes(data)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(UserError, match=f"^{path}: "):
        list(read_hdf5(path, VOCAB))
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 600 * 1024


def test_variable_rows_that_share_their_numbers(tmp_path: Path) -> None:
    """Many references to one long row make a store of any size from a small file."""
    path = write(tmp_path / "part.hdf5", variable=True)
    rows, width = 3000, 5000
    with h5py.File(path, "a") as file:
        for name in (*NAMES, "next_sentence_labels"):
            del file[name]
        file["next_sentence_labels"] = np.zeros(rows, np.int8)
        for name, row in zip(NAMES, ([7] * width, [0] * width, [1], [1]), strict=True):
            cells = np.empty(rows, object)
            cells[:] = [np.array(row if index == 0 else row[:1], np.int32) for index in range(rows)]
            file.create_dataset(name, data=cells, dtype=h5py.vlen_dtype(np.int32))
        places = [file[name].id.get_offset() for name in NAMES]
    data = bytearray(path.read_bytes())
    for at in places:
        data[at : at + 16 * rows] = data[at : at + 16] * rows
    path.write_bytes(data)
    with pytest.raises(UserError, match="share their numbers"):
        list(read_hdf5(path, VOCAB))
