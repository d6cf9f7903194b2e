"""Checkpoints through torch.distributed.checkpoint (DCP): whole or absent, checksummed, for any number of ranks.

checkpoints/step-00000120/__R_0.distcp   what rank R wrote: slices of flattened weights and moments, its own state
                          tensors.json   which piece lies where: DCP's own list is a pickle, which runs what is in it
                          complete.json  step, ranks, config, counters and clocks, size and hash of every file

A checkpoint is written under a name that begins with a dot and renamed when all of it is on disk: a crash at any moment
leaves the one before. Tensors are stored flat, in slices that any number of ranks can read, sharded or not.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import pickle
import re
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter, _StorageInfo, _StoragePrefix
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import (
    LoadPlan,
    ReadItem,
    SavePlan,
    TensorWriteData,
    WriteItem,
    WriteItemType,
)
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

from bert_fast.claims import remove_own
from bert_fast.errors import UserError
from bert_fast.files import sha256_of, write_json
from bert_fast.run_folder import (
    CHECKPOINT_FILES,
    CHECKPOINT_MANIFEST,
    CHECKPOINT_TENSORS,
    STEP_FOLDER,
    checkpoint_name,
    checkpoints_in,
)
from bert_fast.train.collectives import broadcast_json, gather_json

FORMAT = "bert_fast checkpoint 5"
_BEFORE_THE_RENAMING = tuple(f"bert_fast checkpoint {number}" for number in (1, 2, 3))
_SHARE = re.compile(r"__\d+_\d+\.distcp")
_DTYPES = {str(t).removeprefix("torch."): t for t in vars(torch).values() if isinstance(t, torch.dtype)}


@dataclass(frozen=True)
class TensorSlice:
    """Elements [begin, begin + len(values)) of a flattened tensor of `numel` elements. `values` is flat."""

    name: str
    begin: int
    numel: int
    values: torch.Tensor


class _Saving(DefaultSavePlanner):
    """DCP's planner over slices instead of a state dict."""

    def __init__(self, slices: Sequence[TensorSlice]) -> None:
        super().__init__(flatten_state_dict=False)
        self._slices = slices
        self._values = {(s.name, s.begin): s.values for s in slices}

    def create_local_plan(self) -> SavePlan:
        self.plan = SavePlan([_write_item(piece) for piece in self._slices])
        return self.plan

    def lookup_object(self, index: MetadataIndex) -> torch.Tensor:
        assert index.offset is not None
        return self._values[index.fqn, index.offset[0]]


class _Loading(DefaultLoadPlanner):
    """Fills slices from whatever slices were written."""

    def __init__(self, slices: Sequence[TensorSlice]) -> None:
        super().__init__(flatten_state_dict=False)
        self._slices = slices
        self._values = {(s.name, s.begin): s.values for s in slices}

    def create_local_plan(self) -> LoadPlan:
        assert self.metadata is not None
        items: list[ReadItem] = []
        for piece in self._slices:
            entry = self.metadata.state_dict_metadata[piece.name]
            items += create_read_items_for_chunk_list(piece.name, entry, [_chunk(piece)])  # type: ignore[arg-type]
        return LoadPlan(items)

    def resolve_tensor(self, read_item: ReadItem) -> torch.Tensor:
        index = read_item.dest_index
        assert index.offset is not None
        start = read_item.dest_offsets[0]
        return self._values[index.fqn, index.offset[0]][start : start + read_item.lengths[0]]


def _chunk(piece: TensorSlice) -> ChunkStorageMetadata:
    return ChunkStorageMetadata(torch.Size([piece.begin]), torch.Size([len(piece.values)]))


def _write_item(piece: TensorSlice) -> WriteItem:
    properties = TensorProperties.create_from_tensor(piece.values)
    data = TensorWriteData(_chunk(piece), properties, torch.Size([piece.numel]))
    index = MetadataIndex(piece.name, torch.Size([piece.begin]))
    return WriteItem(index, WriteItemType.SHARD, tensor_data=data)


def as_bytes(name: str, value: Any) -> TensorSlice:
    """Anything torch can save, as a piece of bytes."""
    buffer = io.BytesIO()
    torch.save(value, buffer)
    values = torch.frombuffer(buffer.getbuffer(), dtype=torch.uint8)
    return TensorSlice(name, 0, len(values), values)


# ---- writing --------------------------------------------------------------------------------------------------------


def write_checkpoint(
    folder: Path,
    slices: Sequence[TensorSlice],
    description: dict[str, Any],
    rank: int,
    keep: int,
    group: dist.ProcessGroup | None,
    own_work: contextlib.AbstractContextManager[None] | None = None,
) -> None:
    """Write one checkpoint and remove all but the newest `keep`. A collective over `group` (None: one rank alone).

    Args:
        slices: what this rank writes, on the host. Over all ranks they must cover every tensor once.
        description: rank 0's: `step`, and whatever else `complete.json` shall hold.
        own_work: entered, several times, around what this rank does alone.

    Raises:
        UserError: some rank could not write; the text says which and why. What was there before is as it was.
    """
    step, own_work = description["step"], own_work or contextlib.nullcontext()
    target, unfinished = folder / checkpoint_name(step), folder / f".{checkpoint_name(step)}.tmp"
    error: str | None = None
    try:
        if rank == 0:
            with own_work, contextlib.suppress(OSError):
                _remove(unfinished)
        _from_rank_0(None, group)  # nobody writes before; a barrier would take NCCL's device for its tensor
        with own_work:
            mine: Any = _write_share(unfinished, slices, rank)
    except Exception as caught:
        mine = error = _explain(caught, folder, rank)
    everyone = [mine] if group is None else gather_json(mine, group)
    if rank == 0:
        failures = [each for each in everyone if isinstance(each, str)]
        error = error or (failures[0] if failures else None)
        with own_work:
            if error is None:
                files = {name: entry for each in everyone for name, entry in each["files"].items()}
                written = [entry for each in everyone for entry in each["tensors"]]
                error = _complete_one(folder, unfinished, target, {**description, "files": files}, written, keep)
            if error is not None:  # before the others hear of it, and end the run perhaps
                with contextlib.suppress(OSError):
                    _remove(unfinished)
    error = _from_rank_0(error, group)
    if error is not None:
        raise UserError(f"checkpoint of step {step} was not written: {error}. {_what_there_is(folder)}")


def _write_share(folder: Path, slices: Sequence[TensorSlice], rank: int) -> dict[str, Any]:
    """Write this rank's slices through DCP's writer. Returns its files and where each piece is, as plain values."""
    folder.mkdir(parents=True, exist_ok=True)
    # Without read-ahead: tensors are on the host already, and DCP would wait for a CUDA stream to copy them
    writer = FileSystemWriter(folder, per_thread_copy_ahead=0)
    planner = _Saving(slices)
    plan = replace(planner.create_local_plan(), storage_data=_StoragePrefix(f"__{rank}_"))
    by_index = {(s.name, s.begin): s for s in slices}
    tensors = []
    for written in writer.write_data(plan, planner).wait():
        piece = by_index[written.index.fqn, written.index.offset[0]]  # type: ignore[index]
        place = written.storage_data
        kind = str(piece.values.dtype).removeprefix("torch.")
        size = [piece.numel, piece.begin, len(piece.values)]
        tensors.append([piece.name, kind, *size, place.relative_path, place.offset, place.length])
    names = sorted({entry[5] for entry in tensors})
    return {"files": {name: _file_entry(folder / name) for name in names}, "tensors": tensors}


def _file_entry(path: Path) -> dict[str, Any]:
    return {"bytes": path.stat().st_size, "sha256": sha256_of(path)}


def _list_of_tensors(written: list[list[Any]]) -> dict[str, Any]:
    """What all ranks wrote, by tensor. Raises ValueError where that does not cover a tensor exactly once."""
    tensors: dict[str, Any] = {}
    ends: dict[str, int] = {}
    for name, kind, numel, begin, length, *place in sorted(written, key=lambda entry: (entry[0], entry[3])):
        entry = tensors.setdefault(name, {"dtype": kind, "numel": numel, "slices": []})
        if (kind, numel, begin) != (entry["dtype"], entry["numel"], ends.get(name, 0)):
            raise ValueError(f"the ranks did not write {name} exactly once")
        ends[name] = begin + length
        entry["slices"].append([begin, length, *place])
    for name, entry in tensors.items():
        if ends[name] != entry["numel"]:
            raise ValueError(f"the ranks did not write {name} as a whole")
    return tensors


def _complete_one(
    folder: Path, unfinished: Path, target: Path, manifest: dict[str, Any], written: list[list[Any]], keep: int
) -> str | None:
    """Rank 0: the list of tensors, the manifest, the rename, the removal of older ones. Returns what went wrong."""
    replaced = folder / f".{target.name}.old"
    try:
        write_json(unfinished / CHECKPOINT_TENSORS, _list_of_tensors(written))
        manifest["files"][CHECKPOINT_TENSORS] = _file_entry(unfinished / CHECKPOINT_TENSORS)
        body = {"format": FORMAT, **manifest}
        write_json(unfinished / CHECKPOINT_MANIFEST, {**body, "sha256": _body_hash(body)})
        _sync(unfinished)
        if target.exists():  # a run that was thrown back to before this step
            _remove(replaced, target)
            os.replace(target, replaced)
        os.replace(unfinished, target)
        _sync(folder)
        _remove(replaced, target)
        paths = checkpoints_in(folder)
        newer = [path for path in paths if path.name > target.name]  # a run that was thrown back does not come to them
        for old in [*newer, *[path for path in paths if path not in newer][:-keep]]:
            _remove(old)
    except (OSError, ValueError) as caught:  # a UserError is one
        return _explain(caught, folder, 0)
    return None


def _remove(checkpoint: Path, successor: Path | None = None) -> None:
    """Remove a checkpoint's own files, whole or half of one. Whatever else lies in its folder stays, or goes to `successor`."""
    if checkpoint.is_symlink() or not checkpoint.is_dir():  # somebody keeps it elsewhere
        return
    (checkpoint / CHECKPOINT_MANIFEST).unlink(missing_ok=True)  # first, so that half of it never counts
    for stays in remove_own(checkpoint, CHECKPOINT_FILES):
        if successor is not None and len(stays.parts) == 1 and not (successor / stays).exists():
            os.replace(checkpoint / stays, successor / stays)
    with contextlib.suppress(OSError):  # something of the user's is in it
        checkpoint.rmdir()


def _body_hash(body: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()


def _sync(folder: Path) -> None:
    """Make names in a folder durable, where the file system can."""
    with contextlib.suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def _explain(error: Exception, folder: Path, rank: int) -> str:
    """One line."""
    with contextlib.suppress(OSError):
        if shutil.disk_usage(folder).free < 1 << 20 or getattr(error, "errno", None) in (28, 122):
            return f"disk full ({folder}, rank {rank}); free space and --resume"
    text = (str(error) or type(error).__name__).splitlines()[0]
    return f"rank {rank}: {text[:200]}"


def _what_there_is(folder: Path) -> str:
    complete = checkpoints_in(folder)
    return f"The last complete one is {complete[-1].name}" if complete else "There is no complete one"


def _from_rank_0(value: Any, group: dist.ProcessGroup | None) -> Any:
    return value if group is None else broadcast_json(value, 0, group)


def remove_partial(folder: Path) -> None:
    """What a crash left of writing: half a checkpoint goes; one that was about to be replaced comes back."""
    for old in folder.glob(f".{STEP_FOLDER}.old"):
        target = folder / old.name.removeprefix(".").removesuffix(".old")
        if target.exists():
            with contextlib.suppress(OSError):
                _remove(old, target)
        else:
            os.replace(old, target)
    for unfinished in folder.glob(f".{STEP_FOLDER}.tmp"):
        with contextlib.suppress(OSError):
            _remove(unfinished)


# ---- reading --------------------------------------------------------------------------------------------------------


def latest_checkpoint(folder: Path) -> Path | None:
    """The newest complete checkpoint, if there is one."""
    complete = checkpoints_in(folder)
    return complete[-1] if complete else None


class OtherFormatError(UserError):
    """A checkpoint is whole, and of a format that this code does not read."""


def read_description(path: Path) -> dict[str, Any]:
    """complete.json.

    Raises:
        OtherFormatError: it is of another format.
        UserError: it is damaged.
    """
    try:
        description: dict[str, Any] = json.loads((path / CHECKPOINT_MANIFEST).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        raise UserError(f"checkpoint {path} is damaged ({CHECKPOINT_MANIFEST} is not JSON); remove it") from None
    saved = description.get("format", _BEFORE_THE_RENAMING[0])
    if saved != FORMAT:
        age = ", written before settings were renamed," if saved in _BEFORE_THE_RENAMING else ""
        raise OtherFormatError(
            f"checkpoint {path} is of format {saved!r}{age} and this code reads {FORMAT!r}; resume with the code that wrote "
            "it, or start a new run. A new run can start from the weights of this one only if it saved its final model: "
            "checkpoint.init_from=RUN/model"
        )
    return description


def verify_checkpoint(path: Path, rank: int = 0, world: int = 1) -> str | None:
    """What is wrong with this rank's share of a checkpoint's files (every `world`-th), by size and hash; None if nothing.

    Raises:
        OtherFormatError: it is of another format.
    """
    try:
        description = read_description(path)
        if description.pop("sha256") != _body_hash(description):
            return f"{CHECKPOINT_MANIFEST} has changed since it was written"
        files: dict[str, dict[str, Any]] = description["files"]
        for name in sorted(files)[rank::world]:
            file = path / name
            if not file.is_file():
                return f"{name} is missing"
            if file.stat().st_size != files[name]["bytes"]:
                return f"{name} has {file.stat().st_size:,} bytes of {files[name]['bytes']:,}"
            if sha256_of(file) != files[name]["sha256"]:
                return f"{name} has changed since it was written"
    except OtherFormatError:
        raise
    except UserError as error:
        return str(error)
    except (OSError, KeyError, TypeError) as error:
        return f"{type(error).__name__}: {error}"
    return None


def read_metadata(path: Path) -> Metadata:
    """The list of the tensors in a checkpoint, as DCP has it. Raises UserError where it is none."""
    try:
        tensors = json.loads((path / CHECKPOINT_TENSORS).read_text(encoding="utf-8"))
        entries, places = {}, {}
        for name, entry in tensors.items():
            kind, numel = _DTYPES[entry["dtype"]], _count(entry["numel"])
            chunks = []
            for begin, length, file, offset, size in entry["slices"]:
                if not _SHARE.fullmatch(file):
                    raise ValueError(f"{file} is not the name of a rank's file")
                chunk = ChunkStorageMetadata(torch.Size([_count(begin)]), torch.Size([_count(length)]))
                chunks.append(chunk)
                places[MetadataIndex(name, chunk.offsets)] = _StorageInfo(file, _count(offset), _count(size))
            entries[name] = TensorStorageMetadata(TensorProperties(kind), torch.Size([numel]), chunks)
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise UserError(
            f"checkpoint {path} is damaged ({CHECKPOINT_TENSORS}: {type(error).__name__}: {error}); remove it"
        ) from None
    return Metadata(entries, storage_data=places)  # type: ignore[arg-type]


def _count(value: Any) -> int:
    if type(value) is not int or not 0 <= value < 1 << 62:
        raise ValueError(f"{str(value)[:40]} is not a count")
    return value


def read_slices(path: Path, slices: Sequence[TensorSlice]) -> None:
    """Fill the values of `slices` (on any device); each rank by itself. Raises UserError for what is not there."""
    metadata = read_metadata(path)
    entries = metadata.state_dict_metadata
    for piece in slices:
        entry = entries.get(piece.name)
        if entry is None:
            raise UserError(f"checkpoint {path} has no tensor {piece.name}; it is of another model or optimizer")
        size = entry.size[0]  # type: ignore[union-attr]
        if size != piece.numel:
            raise UserError(
                f"checkpoint {path} has {size:,} numbers in {piece.name} and the model {piece.numel:,}; it is of another "
                "model"
            )
    if slices:
        reader, planner = FileSystemReader(path), _Loading(slices)
        planner.set_up_planner({}, metadata, is_coordinator=True)
        reader.set_up_storage_reader(metadata, is_coordinator=True)
        try:
            reader.read_data(planner.create_local_plan(), planner).wait()
        except (
            Exception
        ) as error:  # of whatever kind: the hashes are right, and what is in the files is not what a rank writes
            text = (str(error) or type(error).__name__).splitlines()[0]
            raise UserError(
                f"checkpoint {path} cannot be read ({type(error).__name__}: {text[:120]}); remove it"
            ) from None


def read_bytes(path: Path, metadata: Metadata, name: str) -> Any:
    """What `as_bytes` stored under `name`; None if there is no such entry."""
    entry = metadata.state_dict_metadata.get(name)
    if entry is None:
        return None
    values = torch.empty(entry.size[0], dtype=torch.uint8)  # type: ignore[union-attr]
    read_slices(path, [TensorSlice(name, 0, len(values), values)])
    try:
        return torch.load(io.BytesIO(values.numpy().tobytes()), weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError) as error:
        raise UserError(f"checkpoint {path} cannot be read ({name}: {type(error).__name__}); remove it") from None
