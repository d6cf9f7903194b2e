"""The store: one memory-mapped token file, a table of offsets, a length table, a manifest.

`samples.bin` is uint16, the records of all samples end to end (`data.record`).
`offsets.npy` (int64, N+1) holds where records start, in uint16 units. `lengths.npy` (uint16, N) and `num_masked.npy`
(uint16, N) hold the tokens and masks of every sample, for the planner. All ranks of a node share them through the page cache.
`blocks.npy` (uint32) holds the CRC-32 of every 4 MiB of `samples.bin`, which a run compares in the background (`data.scrub`).
"""

from __future__ import annotations

import hashlib
import json
import tokenize
import warnings
import zipfile
import zlib
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, ClassVar

import numpy as np

from bert_fast.command import one_line
from bert_fast.data.batch import Batch, assemble
from bert_fast.data.record import count_random_next, num_masked_at, pack_record, record_sizes, unpack_record
from bert_fast.data.samples import Sample
from bert_fast.errors import UserError
from bert_fast.files import atomic_file, read_json, sha256_of, write_json

FORMAT = "bert_fast store 1"
_TABLES = ("offsets.npy", "lengths.npy", "num_masked.npy")
_BLOCKS = "blocks.npy"
FILES = ("samples.bin", *_TABLES, _BLOCKS, "manifest.json")  # all files of a store
BLOCK_BYTES = 1 << 22  # of samples.bin that share a checksum
# What np.load raises for a damaged header of a .npy file, which it evaluates as a Python literal
DAMAGED = (
    OSError,
    ValueError,
    EOFError,
    TypeError,
    KeyError,
    OverflowError,
    MemoryError,
    SyntaxError,
    tokenize.TokenError,
)
_NEEDED = ("num_samples", "max_length", "vocab_size", "vocab_sha256", "sha256")
_MANIFEST: dict[str, type] = {
    "num_samples": int,
    "num_tokens": int,
    "num_masked": int,
    "num_random_next": int,
    "max_length": int,
    "vocab_size": int,
    "mask_id": int,
    "vocab_sha256": str,
    "sha256": str,
    "tables_sha256": dict,
    "length_histogram": dict,
}
_BLOCK_SAMPLES = 4096
_BYTES = np.dtype(np.uint16).itemsize


@dataclass(frozen=True)
class Part:
    """A finished part of a store on disk, written by one worker; its tables lie next to it."""

    path: str
    num_samples: int
    num_random_next: int

    def tables(self) -> tuple[np.ndarray, np.ndarray]:
        """lengths and num_masked, uint16 [num_samples]."""
        with np.load(f"{self.path}.npz") as loaded:
            return loaded["lengths"], loaded["num_masked"]


def write_part(path: str | Path, samples: Iterable[Sample]) -> Part:
    """Write the records of `samples` to `path` and their tables next to it, atomically. Raises UserError as `atomic_file`."""
    lengths: list[int] = []
    num_masked: list[int] = []
    num_random = 0
    with atomic_file(path) as file:
        for sample in samples:
            file.write(pack_record(sample).tobytes())
            lengths.append(len(sample.input_ids))
            num_masked.append(len(sample.masked_positions))
            num_random += sample.is_random_next
    return _finish_part(path, np.array(lengths, np.uint16), np.array(num_masked, np.uint16), num_random)


def write_part_of_records(path: str | Path, blocks: Iterable[tuple[np.ndarray, np.ndarray, np.ndarray, int]]) -> Part:
    """As `write_part`, from blocks of (records uint16, lengths, num_masked, number of samples with a random next)."""
    lengths, num_masked, num_random = [np.zeros(0, np.uint16)], [np.zeros(0, np.uint16)], 0
    with atomic_file(path) as file:
        for records, block_lengths, block_masked, block_random in blocks:
            file.write(records.tobytes())
            lengths.append(block_lengths.astype(np.uint16))
            num_masked.append(block_masked.astype(np.uint16))
            num_random += block_random
    return _finish_part(path, np.concatenate(lengths), np.concatenate(num_masked), num_random)


def _finish_part(path: str | Path, lengths: np.ndarray, num_masked: np.ndarray, num_random: int) -> Part:
    with atomic_file(f"{path}.npz") as file:
        np.savez(file, lengths=lengths, num_masked=num_masked, num_random=np.array(num_random))
    return Part(str(path), len(lengths), num_random)


def take_first(parts: list[Part], limit: int, folder: Path) -> list[Part]:
    """The first `limit` samples of the parts, in order; the part that is cut is written to `folder`."""
    kept: list[Part] = []
    for part in parts:
        if limit <= 0:
            break
        if part.num_samples > limit:
            lengths, num_masked = part.tables()
            ends = np.cumsum(record_sizes(lengths, num_masked))
            part = write_part_of_records(folder / "head.bin", _head(part.path, ends[:limit], lengths, num_masked))
        kept.append(part)
        limit -= part.num_samples
    return kept


def take_evenly(parts: list[Part], count: int, folder: Path) -> list[Part]:
    """`count` samples spread evenly over the parts, written to `folder`; all parts if they have no more samples.

    MLPerf's reference picks its evaluation set this way: sample int(i * candidates / count) for i = 0 ... count - 1.
    """
    total = sum(part.num_samples for part in parts)
    if total <= count:
        return parts
    wanted = (np.arange(count) * (total / count)).astype(np.int64)
    return [write_part_of_records(folder / "picked.bin", picked(parts, wanted))]


def picked(parts: list[Part], wanted: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray, int]]:
    """The samples with these numbers (int64, ascending) as blocks of `write_part_of_records`, one per part."""
    first = 0
    for part in parts:
        ids = wanted[(wanted >= first) & (wanted < first + part.num_samples)] - first
        first += part.num_samples
        if len(ids):
            lengths, num_masked = part.tables()
            ends = np.cumsum(record_sizes(lengths, num_masked))
            starts = ends - record_sizes(lengths, num_masked)
            data = np.fromfile(part.path, dtype=np.uint16)
            records = np.concatenate([data[starts[i] : ends[i]] for i in ids])
            yield records, lengths[ids], num_masked[ids], count_random_next(data, starts[ids])


def _head(
    path: str, ends: np.ndarray, lengths: np.ndarray, num_masked: np.ndarray
) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray, int]]:
    """A part's first records, which end at `ends` (uint16 units), as blocks of some thousand samples."""
    data = np.memmap(path, dtype=np.uint16, mode="r").view(np.ndarray)
    for first in range(0, len(ends), _BLOCK_SAMPLES):
        rows = slice(first, min(first + _BLOCK_SAMPLES, len(ends)))
        starts = np.concatenate([[ends[first - 1] if first else 0], ends[rows][:-1]])
        records = data[int(starts[0]) : int(ends[rows][-1])]
        yield records, lengths[rows], num_masked[rows], count_random_next(data, starts)


def read_part(path: str | Path) -> Part | None:
    """The part at `path` if it was finished, else None."""
    tables = Path(f"{path}.npz")
    if not tables.is_file() or not Path(path).is_file():
        return None
    try:
        with np.load(tables, allow_pickle=False) as loaded:
            part = Part(str(path), len(loaded["lengths"]), int(loaded["num_random"]))
            expected = record_sizes(loaded["lengths"], loaded["num_masked"]).sum() * _BYTES
    except (*DAMAGED, zipfile.BadZipFile, zlib.error):  # damaged: it is made again
        return None
    return part if Path(path).stat().st_size == expected else None


def merge_parts(
    folder: str | Path, parts: list[Part], manifest: dict[str, Any], more_tables: Mapping[str, np.ndarray] | None = None
) -> dict[str, Any]:
    """Join parts into a store in `folder`. The manifest is written last: a folder without one is not a store.

    Args:
        manifest: entries beside those that are counted here.
        more_tables: further tables of the samples by the names of their files, `groups.npy`, which are hashed as the others.

    Returns:
        The manifest, completed with counts, the length histogram and the hashes of the files.

    Raises:
        UserError: there are no samples, or the disk is full.
    """
    folder = Path(folder)
    total = sum(part.num_samples for part in parts)
    if not total:
        raise UserError(f"no samples for store {folder}: the text is empty or too short for one sentence pair")
    (folder / "manifest.json").unlink(missing_ok=True)
    with atomic_file(folder / "samples.bin") as out:
        for part in parts:
            with open(part.path, "rb") as source:
                while block := source.read(1 << 22):
                    out.write(block)
    sha256 = _write_blocks(folder)
    histogram, masked = np.zeros(1 << 16, np.int64), 0
    with (
        _table_file(folder / "offsets.npy", np.int64, total + 1) as offsets,
        _table_file(folder / "lengths.npy", np.uint16, total) as lengths_file,
        _table_file(folder / "num_masked.npy", np.uint16, total) as masked_file,
    ):
        offsets.write(bytes(8))
        end = 0
        for part in parts:  # one part's tables in memory at a time
            lengths, num_masked = part.tables()
            ends = end + np.cumsum(record_sizes(lengths, num_masked))
            end = int(ends[-1]) if len(ends) else end
            offsets.write(ends.astype("<i8").tobytes())
            lengths_file.write(lengths.astype("<u2").tobytes())
            masked_file.write(num_masked.astype("<u2").tobytes())
            histogram += np.bincount(lengths, minlength=1 << 16)
            masked += int(num_masked.sum(dtype=np.int64))
    for name, table in (more_tables or {}).items():
        with atomic_file(folder / name) as out:
            np.save(out, table)
    used = np.flatnonzero(histogram)
    tokens = int((histogram[used] * used).sum())
    complete = {
        "format": FORMAT,
        "num_samples": total,
        "num_tokens": tokens,
        "num_masked": masked,
        "num_random_next": sum(part.num_random_next for part in parts),
        "max_length": int(used[-1]),
        "mean_length": round(tokens / total, 3),
        "length_histogram": {str(n): int(histogram[n]) for n in used},
        "sha256": sha256,
        "tables_sha256": {name: sha256_of(folder / name) for name in (*_TABLES, _BLOCKS, *(more_tables or {}))},
        **manifest,
    }
    write_json(folder / "manifest.json", complete)
    return complete


def _write_blocks(folder: Path) -> str:
    """Write the checksums of samples.bin's blocks. Returns the hash of the whole file, from the same read."""
    crcs, digest = [], hashlib.sha256()
    with open(folder / "samples.bin", "rb") as file:
        while content := file.read(BLOCK_BYTES):
            crcs.append(zlib.crc32(content))
            digest.update(content)
    with atomic_file(folder / _BLOCKS) as out:
        np.save(out, np.array(crcs, dtype=np.uint32))
    return digest.hexdigest()


@contextmanager
def _table_file(path: Path, kind: type[np.generic], count: int) -> Iterator[BinaryIO]:
    """A .npy file of `count` numbers, whose bytes the caller writes."""
    with atomic_file(path) as file:
        header = {"descr": np.dtype(kind).newbyteorder("<").str, "fortran_order": False, "shape": (count,)}
        np.lib.format.write_array_header_1_0(file, header)
        yield file


def is_store(folder: Path) -> bool:
    """Whether the program has written a store there, by the format in its manifest."""
    try:
        return bool(json.loads((folder / "manifest.json").read_text(encoding="utf-8"))["format"] == FORMAT)
    except (OSError, ValueError, KeyError, TypeError):
        return False


def read_table(path: Path) -> np.ndarray:
    """A memory-mapped one-dimensional array of integers. Raises one of `DAMAGED`."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about headers that numpy parses in a slower way
        table: object = np.load(path, mmap_mode="r")
    if not isinstance(table, np.ndarray) or table.ndim != 1 or table.dtype.kind not in "iu" or table.dtype.itemsize > 8:
        raise ValueError(f"{path.name} is no list of whole numbers")
    return table


def _shown(value: Any) -> str:
    return one_line(repr(value), 100)


class Store:
    """Read access to a prepared store. Opening is O(1) in the number of samples; tables are memory-mapped."""

    kind: ClassVar[str] = "samples"
    """What its samples are, as `kind` in the manifest has it; a store of pretraining samples has no such entry."""

    command: ClassVar[str] = "scripts/prepare_data.py"
    """The script that makes such a store."""

    def __init__(self, folder: str | Path) -> None:
        """Open `folder`. Raises UserError for a missing, foreign or truncated store."""
        self.folder = Path(folder)
        manifest_path = self.folder / "manifest.json"
        if not manifest_path.is_file():
            raise UserError(
                f"no data at {self.folder} (manifest.json is missing); make it with: "
                f"python {self.command} --out {self.folder.parent}"
            )
        try:
            self.manifest: dict[str, Any] = read_json(manifest_path, "manifest")
        except UserError as error:
            raise UserError(f"{error}; prepare the data again") from None
        form = self.manifest.get("format")
        if form != FORMAT:
            raise UserError(f"{manifest_path} is of format {_shown(form)}, this code reads {FORMAT!r}")
        for name, kind in _MANIFEST.items():
            value = self.manifest.get(name, None if name in _NEEDED else kind())
            if not isinstance(value, kind):
                raise UserError(f"{manifest_path}: {name} is {_shown(value)}; prepare the data again")
        promised = self.manifest.get("num_samples")
        try:
            self._tokens = np.memmap(self.folder / "samples.bin", dtype=np.uint16, mode="r").view(np.ndarray)
            self._offsets, self.lengths, self.num_masked = (read_table(self.folder / name) for name in _TABLES)
            blocks = self.folder / _BLOCKS
            self.block_crcs = read_table(blocks) if blocks.is_file() else None  # older stores have none
        except DAMAGED as error:
            reason = (str(error).splitlines() or [type(error).__name__])[0][:200]
            raise UserError(f"store {self.folder} is damaged ({reason}); prepare the data again") from None
        tables = (len(self._offsets) - 1, len(self.lengths), len(self.num_masked))
        if any(n != promised for n in tables) or self._offsets[-1] != len(self._tokens):
            raise UserError(
                f"store {self.folder} is truncated: the manifest promises {promised} samples in "
                f"{int(self._offsets[-1]) * _BYTES} bytes, samples.bin has {len(self._tokens) * _BYTES}; "
                "prepare the data again"
            )

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, index: int) -> Sample:
        self._check_records(np.array([index]))
        return unpack_record(self._tokens[self._offsets[index] : self._offsets[index + 1]])

    def _check_records(self, ids: np.ndarray, headers: bool = True) -> None:
        """Refuse samples whose record disagrees with the tables: in a damaged store other bytes would be read."""
        starts, ends = self._offsets[ids], self._offsets[ids + 1]
        sizes = record_sizes(self.lengths[ids], self.num_masked[ids])
        wrong = (starts < 0) | (ends > len(self._tokens)) | (ends - starts != sizes)
        if headers and not wrong.any():
            wrong = num_masked_at(self._tokens, starts) != self.num_masked[ids]
        if wrong.any():
            raise UserError(
                f"store {self.folder} is damaged: the tables and the record of sample {int(ids[np.flatnonzero(wrong)[0]])} do "
                "not agree; prepare the data again"
            )

    def records(self, begin: int, end: int) -> tuple[np.ndarray, np.ndarray]:
        """Records of samples begin ... end - 1 end to end (uint16), and where each starts in them (int64 [n])."""
        self._check_records(np.arange(begin, end), headers=False)  # `data.verify` reports wrong headers
        offsets = np.asarray(self._offsets[begin : end + 1])
        return self._tokens[offsets[0] : offsets[-1]], offsets[:-1] - offsets[0]

    def batch(self, ids: np.ndarray, keep_order: bool = False) -> Batch:
        """Samples `ids` (int64 [B]) as one batch, longest first unless `keep_order`."""
        self._check_records(np.asarray(ids))
        return assemble(self._tokens, self._offsets[ids], self._offsets[ids + 1], ids, keep_order)

    def byte_ranges(self, ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The first and the last byte of each of these samples in samples.bin; int64 [B] each."""
        return self._offsets[ids] * _BYTES, self._offsets[ids + 1] * _BYTES - 1

    def samples_at(self, begin: int, end: int) -> tuple[int, int]:
        """The first and the last sample with bytes in [begin, end) of samples.bin."""
        first = np.searchsorted(self._offsets, begin // _BYTES, side="right") - 1
        last = np.searchsorted(self._offsets, (end - 1) // _BYTES, side="right") - 1
        return int(first), min(int(last), len(self) - 1)

    @property
    def longest_sequence(self) -> int:
        """Tokens of the longest sequence that a model is given."""
        return int(self.manifest["max_length"])

    def check(self, *, vocab_size: int, max_seq_len: int, vocab_sha256: str | None, sha256: str | None) -> None:
        """Refuse a store that does not fit the config. Raises UserError.

        Args:
            vocab_sha256, sha256: the hashes that the manifest must have; None accepts any.
        """
        manifest = self.manifest
        self.check_kind()
        if manifest["vocab_size"] > vocab_size:
            raise UserError(
                f"store {self.folder} was made with a vocabulary of {manifest['vocab_size']} tokens and "
                f"model.vocab_size={vocab_size}; use the matching store or model"
            )
        if self.longest_sequence > max_seq_len:
            raise UserError(
                f"store {self.folder} holds a sample of {self.longest_sequence} tokens and "
                f"data.max_seq_len={max_seq_len}; raise it or prepare shorter samples"
            )
        for what, expected, found in (
            ("was made with another vocabulary", vocab_sha256, manifest["vocab_sha256"]),
            ("is not the one the config pins (evaluation.sha256)", sha256, manifest["sha256"]),
        ):
            if expected is not None and expected != found:
                raise UserError(
                    f"store {self.folder} {what}: hash {found[:16]}..., expected {expected[:16]}...; prepare the data "
                    "with the vocabulary and text of this config"
                )

    def check_kind(self) -> None:
        """Refuse a store of something other than what this class reads, which may well be opened. Raises UserError."""
        kind = self.manifest.get("kind", self.kind)
        if kind != self.kind:
            what = "pairs of texts" if kind == "pairs" else _shown(kind)
            raise UserError(
                f"store {self.folder} holds {what} and no pretraining samples; set train.objective=contrastive, or give a "
                f"store of {self.command}"
            )

    def check_bytes(self, sha256: str) -> None:
        """Hash the token file, which may differ from its manifest, and refuse another hash than this. Raises UserError."""
        found = sha256_of(self.folder / "samples.bin")
        if found != sha256:
            raise UserError(
                f"store {self.folder}: samples.bin has the hash {found[:16]}..., expected {sha256[:16]}... "
                "(evaluation.sha256); prepare the data again"
            )

    def verify(self) -> None:
        """Compare the files with the manifest's hashes. Raises UserError naming the file that changed."""
        if "tables_sha256" not in self.manifest:
            raise UserError(f"store {self.folder} has no hashes of its tables to verify; prepare the data again")
        expected = {"samples.bin": self.manifest["sha256"], **self.manifest["tables_sha256"]}
        for name, sha256 in expected.items():
            if sha256_of(self.folder / name) != sha256:
                raise UserError(f"store {self.folder}: {name} changed since it was written; prepare the data again")
