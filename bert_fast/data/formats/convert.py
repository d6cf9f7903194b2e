"""Imports foreign sample files into a store, and exports a store into them: streaming, in parallel, restartable.

Each source file becomes a part of the store in a process of its own. A finished part is kept for a restart, and the manifest is
written last.
"""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from bert_fast.allocator import keep_freed_memory
from bert_fast.claims import claimed, dissolve, owner_of, remove_own
from bert_fast.data.folders import EXPORT, IMPORT_PARTS, STORE, check_one_set
from bert_fast.data.formats.mlperf import is_hdf5, read_blocks, write_hdf5, write_tfrecord
from bert_fast.data.formats.table import SampleTable, from_records, to_records
from bert_fast.data.pool import Pool
from bert_fast.data.store import Part, Store, merge_parts, read_part, take_evenly, take_first, write_part_of_records
from bert_fast.data.wordpiece import load_vocabulary
from bert_fast.errors import UserError
from bert_fast.files import check_space
from bert_fast.integers import ceil_div

FORMS = ("tfrecord", "hdf5", "hdf5-variable")
_EXPORTED_BYTES: dict[str, Callable[[int, int], int]] = {  # per sample, at most about
    "tfrecord": lambda width, masks: 4 * width + 8 * masks + 200,
    "hdf5": lambda width, masks: 12 * width + 8 * masks + 8,
    "hdf5-variable": lambda width, masks: 8 * width + 8 * masks + 100,
}
_BLOCK = 4096
# Bytes of a store over those of its sources: measured 0.25 to 0.4 for TFRecord (0.6 for tiny samples), 0.7 for variable HDF5
_STORE_SHARE = {True: 0.45, False: 0.8}  # is TFRecord

_BYTES_OF_SAMPLE = 2 * (3 + 2 * 76 + 512)  # the longest of MLPerf's

Log = Callable[[str], None]


def import_store(
    sources: list[str],
    out: str | Path,
    vocab: str | Path,
    *,
    max_samples: int | None = None,
    pick: str = "first",
    num_workers: int | None = None,
    log: Log = print,
) -> dict[str, Any]:
    """Make the store `out` from sample files, in the given order. Returns the manifest.

    Args:
        max_samples: how many samples are kept: the first ones, or with pick="evenly" evenly spread as MLPerf's reference does.

    Raises:
        UserError: a file is damaged or not a sample file; the disk is too small or full (finished parts are kept for a
            restart); another process is writing `out`; or it holds files of others that the store would overwrite.
    """
    out = Path(out)
    inside = [path for path in sources if Path(path).resolve().parent == out.resolve()]
    if inside:
        raise UserError(f"--out {out} is the folder of {Path(inside[0]).name}; give the store a folder of its own")
    _check_parent_is_free(out)
    with claimed(out, STORE):
        _check_parent_is_free(out)  # if a preparation began meanwhile, at least one of the two has seen the other
        return _import(sources, out, vocab, max_samples, pick, num_workers, log)


def _check_parent_is_free(out: Path) -> None:
    """Refuse a store in the folder of a running preparation, which writes stores there. Raises UserError."""
    parent = out.absolute().parent
    owner = owner_of(parent)
    if owner:
        raise UserError(f"{parent} is in use by {owner}; wait for it, stop it, or choose another --out")


def _import(
    sources: list[str],
    out: Path,
    vocab: str | Path,
    max_samples: int | None,
    pick: str,
    num_workers: int | None,
    log: Log,
) -> dict[str, Any]:
    start = time.perf_counter()
    vocabulary = load_vocabulary(vocab)
    key = {
        "sources": [[Path(path).name, os.path.getsize(path), int(os.path.getmtime(path))] for path in sources],
        "vocab": vocabulary.sha256,
        "max_samples": max_samples,
        **({"pick": pick} if pick != "first" else {}),
    }
    if _is_done(out, key):
        log(f"{out}: already there")
        return Store(out).manifest
    parts_folder = out.with_name(f"{out.name}.parts")
    part_paths = [_part_path(parts_folder, path, vocabulary.sha256) for path in sources]
    with claimed(parts_folder, IMPORT_PARTS):
        wanted = [Path(name).name for path in part_paths for name in (path, f"{path}.npz")]
        remove_own(parts_folder, IMPORT_PARTS.writes, wanted)  # parts of sources that are gone or have changed
        _check_space(sources, part_paths, parts_folder, max_samples if pick == "first" else None)
        parts, samples, last_line = [], 0, start
        jobs = ((path, part, len(vocabulary)) for path, part in zip(sources, part_paths, strict=True))
        with Pool(num_workers or os.cpu_count() or 1) as pool:
            for part in pool.map(import_part, jobs):
                parts.append(part)
                samples += part.num_samples
                now = time.perf_counter()
                if now - last_line > 5:
                    last_line = now
                    log(
                        f"{len(parts)}/{len(sources)} files, {samples:,} samples, {samples / (now - start):,.0f} samples/s"
                    )
                if max_samples and pick == "first" and samples >= max_samples:
                    break
        if max_samples:
            parts = (take_first if pick == "first" else take_evenly)(parts, max_samples, parts_folder)
        manifest = merge_parts(
            out,
            parts,
            {
                "key": key,
                "corpus": "imported",
                "vocab_sha256": vocabulary.sha256,
                "vocab_size": len(vocabulary),
                "mask_id": vocabulary.mask_id,
            },
        )
    dissolve(parts_folder, IMPORT_PARTS)
    seconds = time.perf_counter() - start
    log(
        f"{out}: {manifest['num_samples']:,} samples from {len(sources):,} files in {seconds:.1f} s "
        f"({manifest['num_samples'] / seconds:,.0f} samples/s)"
    )
    return manifest


def _is_done(out: Path, key: dict[str, Any]) -> bool:
    try:
        return Store(out).manifest.get("key") == key
    except UserError:
        return False


def _part_path(folder: Path, source: str, vocab_sha256: str) -> str:
    """The path of a source's part. Its name depends on the source's size and time, so that a new download is a new part."""
    stat = os.stat(source)
    tag = hashlib.sha256(f"{source} {stat.st_size} {stat.st_mtime_ns} {vocab_sha256}".encode()).hexdigest()[:12]
    return str(folder / f"{Path(source).name}-{tag}.bin")


def _check_space(sources: list[str], parts: list[str], folder: Path, max_samples: int | None) -> None:
    """Refuse a disk that is too small for both parts and store, before hours of work. Raises UserError."""
    made = [Path(part) for part in parts if Path(f"{part}.npz").is_file()]
    done = sum(part.stat().st_size for part in made if part.is_file())
    needed = 0.0
    for source in sources:
        needed += 2 * _STORE_SHARE[not is_hdf5(source)] * os.path.getsize(source)
        if max_samples:  # the first file or two hold them
            needed = min(needed, 2.0 * max_samples * _BYTES_OF_SAMPLE)
    check_space(folder, int(needed) - done, "the import")


def import_part(path: str, part_path: str, vocab_size: int) -> Part:
    """Make the part of one source file, unless it is finished. Raises UserError as `read_blocks`."""
    finished = read_part(part_path)
    if finished:
        return finished
    keep_freed_memory()  # blocks are alike
    blocks = (
        (to_records(t), t.lengths, t.num_masked, int(t.is_random_next.sum())) for t in read_blocks(path, vocab_size)
    )
    return write_part_of_records(part_path, blocks)


def find_sources(pattern: str | Path) -> list[str]:
    """Files of a folder in the order of their names (part-00002-of-00500 before part-00010), or one file.

    Raises:
        UserError: there are no files, parts of two sets, or an export that was stopped.
    """
    path = Path(pattern)
    if path.is_file():
        return [str(path)]
    files = (
        sorted(str(each) for each in path.iterdir() if each.is_file() and not each.name.startswith("."))
        if path.is_dir()
        else []
    )
    if not files:
        raise UserError(f"{pattern}: no such file, or a folder without files")
    check_one_set(path, files)
    return files


def export_store(
    folder: str | Path, out: str | Path, form: str, *, width: int, most_masked: int, per_file: int, log: Log
) -> int:
    """Write a store as foreign files part-00000-of-00010 and so on in `out`, replacing an earlier export.

    Args:
        form: one of `FORMS`.
        width, most_masked: tokens and masks to which samples are padded.
        per_file: samples per file.

    Returns:
        The number of files.

    Raises:
        UserError: the rows are too short for the store's samples; the disk is too small; another process is writing `out`; or
            it holds files of others, which readers of the folder would take for samples.
    """
    store = Store(folder)
    store.check_kind()
    if per_file < 1:
        raise UserError(f"--per-file {per_file}: give at least 1")
    if store.manifest["max_length"] > width or int(store.num_masked.max()) > most_masked:
        raise UserError(
            f"{folder} has samples of {store.manifest['max_length']} tokens and {int(store.num_masked.max())} masks; rows of "
            f"{width} and {most_masked} do not hold them"
        )
    check_space(Path(out), len(store) * _EXPORTED_BYTES[form](width, most_masked), "the export")
    number = ceil_div(len(store), per_file)
    suffix = "tfrecord" if form == "tfrecord" else "hdf5"
    with claimed(Path(out), EXPORT):
        names = [f"part-{index:05d}-of-{number:05d}.{suffix}" for index in range(number)]
        for index, name in enumerate(names):
            blocks = tables_of(store, index * per_file, min(len(store), (index + 1) * per_file))
            path = Path(out) / name
            if form == "tfrecord":
                write_tfrecord(path, blocks, width, most_masked)
            else:
                write_hdf5(path, blocks, width, most_masked, variable=form == "hdf5-variable")
        remove_own(
            Path(out), EXPORT.writes, names
        )  # files of an earlier export, which an import would read as more samples
    log(f"{out}: {len(store):,} samples in {number:,} files")
    return number


def tables_of(store: Store, begin: int, end: int) -> Iterator[SampleTable]:
    """Samples begin ... end - 1, in blocks of at most `_BLOCK`."""
    indices = iter(range(begin, end))
    while block := list(islice(indices, _BLOCK)):
        ids = np.array(block)
        records, starts = store.records(block[0], block[-1] + 1)
        yield from_records(records, starts, np.asarray(store.lengths[ids]), np.asarray(store.num_masked[ids]))
