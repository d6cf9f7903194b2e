"""Checkpoints through torch.distributed.checkpoint (DCP): whole or absent, checksummed, for any number of ranks.

checkpoints/step-00000120/__R_0.distcp   what rank R wrote: stretches of flattened weights and moments, its own state
                          .metadata      which stretch lies where (DCP's own)
                          complete.json  step, ranks, config, counters and clocks, size and hash of every file

A checkpoint is written under a name that begins with a dot and renamed when all of it is on disk: a crash at any moment
leaves the one before. Tensors are stored flat, in stretches that any number of ranks can read, sharded or not.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import shutil
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, Metadata, MetadataIndex, TensorProperties
from torch.distributed.checkpoint.planner import (
    LoadPlan,
    ReadItem,
    SavePlan,
    SavePlanner,
    TensorWriteData,
    WriteItem,
    WriteItemType,
)
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future

from bert_fast.errors import UserError
from bert_fast.files import CHECKPOINT_MANIFEST, checkpoints_in, sha256_of, write_json

FORMAT = "bert_fast checkpoint 2"
# One rank saves, and every rank loads, without a process group: DCP says so each time.
warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable or uninitialized")


@dataclass(frozen=True)
class Stretch:
    """Elements [begin, begin + len(values)) of a flattened tensor of `numel` elements. `values` is flat."""

    name: str
    begin: int
    numel: int
    values: torch.Tensor


class _Saving(DefaultSavePlanner):
    """DCP's planner over stretches instead of a state dict."""

    def __init__(self, stretches: Sequence[Stretch]) -> None:
        super().__init__(flatten_state_dict=False)
        self._stretches = stretches
        self._values = {(s.name, s.begin): s.values for s in stretches}

    def create_local_plan(self) -> SavePlan:
        self.plan = SavePlan([_write_item(stretch) for stretch in self._stretches])
        return self.plan

    def lookup_object(self, index: MetadataIndex) -> torch.Tensor:
        assert index.offset is not None
        return self._values[index.fqn, index.offset[0]]


class _Writer(dcp.FileSystemWriter):
    """Says when this rank writes and waits for nobody."""

    def __init__(self, folder: Path, own_work: contextlib.AbstractContextManager[None]) -> None:
        # Without read-ahead: tensors are on the host already, and DCP would wait for a CUDA stream to copy them
        super().__init__(folder, per_thread_copy_ahead=0)
        self._own_work = own_work

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        with self._own_work:  # makes the folder
            return super().prepare_local_plan(plan)

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        with self._own_work:
            written = super().write_data(plan, planner)
            written.wait()
        return written

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        with self._own_work:
            super().finish(metadata, results)


class _Loading(DefaultLoadPlanner):
    """Fills stretches from whatever stretches were written."""

    def __init__(self, stretches: Sequence[Stretch]) -> None:
        super().__init__(flatten_state_dict=False)
        self._stretches = stretches
        self._values = {(s.name, s.begin): s.values for s in stretches}

    def create_local_plan(self) -> LoadPlan:
        assert self.metadata is not None
        items: list[ReadItem] = []
        for stretch in self._stretches:
            entry = self.metadata.state_dict_metadata[stretch.name]
            items += create_read_items_for_chunk_list(stretch.name, entry, [_chunk(stretch)])  # type: ignore[arg-type]
        return LoadPlan(items)

    def resolve_tensor(self, read_item: ReadItem) -> torch.Tensor:
        index = read_item.dest_index
        assert index.offset is not None
        start = read_item.dest_offsets[0]
        return self._values[index.fqn, index.offset[0]][start : start + read_item.lengths[0]]


def _chunk(stretch: Stretch) -> ChunkStorageMetadata:
    return ChunkStorageMetadata(torch.Size([stretch.begin]), torch.Size([len(stretch.values)]))


def _write_item(stretch: Stretch) -> WriteItem:
    properties = TensorProperties.create_from_tensor(stretch.values)
    data = TensorWriteData(_chunk(stretch), properties, torch.Size([stretch.numel]))
    index = MetadataIndex(stretch.name, torch.Size([stretch.begin]))
    return WriteItem(index, WriteItemType.SHARD, tensor_data=data)


def as_bytes(name: str, value: Any) -> Stretch:
    """Anything torch can save, as a stretch of bytes."""
    buffer = io.BytesIO()
    torch.save(value, buffer)
    values = torch.frombuffer(buffer.getbuffer(), dtype=torch.uint8)
    return Stretch(name, 0, len(values), values)


# ---- writing --------------------------------------------------------------------------------------------------------


def folder_name(step: int) -> str:
    """The name of a step's checkpoint."""
    return f"step-{step:08d}"


def write_checkpoint(
    folder: Path, stretches: Sequence[Stretch], description: dict[str, Any], rank: int, keep: int,
    group: dist.ProcessGroup | None, own_work: contextlib.AbstractContextManager[None] | None = None,
) -> None:  # fmt: skip
    """Write one checkpoint and remove all but the newest `keep`. A collective over `group` (None: one rank alone).

    Args:
        stretches: what this rank writes, on the host. Over all ranks they must cover every tensor once.
        description: rank 0's: `step`, and whatever else `complete.json` shall hold.
        own_work: entered, several times, around what this rank does alone.

    Raises:
        UserError: some rank could not write; the text says which and why. What was there before is as it was.
    """
    step, own_work = description["step"], own_work or contextlib.nullcontext()
    target, unfinished = folder / folder_name(step), folder / f".{folder_name(step)}.tmp"
    error: str | None = None
    try:
        if rank == 0:
            with own_work:
                shutil.rmtree(unfinished, ignore_errors=True)
        _from_rank_0(None, group)  # nobody writes before; a barrier would take NCCL's device for its tensor
        writer = _Writer(unfinished, own_work)
        dcp.save({}, storage_writer=writer, planner=_Saving(stretches), process_group=group, no_dist=group is None)
        with own_work:
            names = [p.name for p in unfinished.glob(f"__{rank}_*.distcp")] + [".metadata"] * (rank == 0)
            mine: Any = {
                n: {"bytes": (unfinished / n).stat().st_size, "sha256": sha256_of(unfinished / n)} for n in names
            }
    except (Exception, CheckpointException) as caught:  # of any rank: DCP raises on all; its own is a BaseException
        mine = error = _explain(caught, folder, rank)
    everyone = _gather(mine, rank, group)
    if rank == 0:
        failures = [each for each in everyone if isinstance(each, str)]
        error = error or (failures[0] if failures else None)
        if error is None:
            files = {name: entry for each in everyone for name, entry in each.items()}
            with own_work:
                error = _complete_one(folder, unfinished, target, {**description, "files": files}, keep)
        if error is not None:  # before the others hear of it, and end the run perhaps
            with own_work:
                shutil.rmtree(unfinished, ignore_errors=True)
    error = _from_rank_0(error, group)
    if error is not None:
        raise UserError(f"checkpoint of step {step} was not written: {error}. {_what_there_is(folder)}")


def _complete_one(folder: Path, unfinished: Path, target: Path, manifest: dict[str, Any], keep: int) -> str | None:
    """Rank 0: the manifest, the rename, the removal of older ones. Returns what went wrong."""
    replaced = folder / f".{target.name}.old"
    try:
        body = {"format": FORMAT, **manifest}
        write_json(unfinished / CHECKPOINT_MANIFEST, {**body, "sha256": _body_hash(body)})
        _sync(unfinished)
        if target.exists():  # a run that was thrown back to before this step
            os.replace(target, replaced)
        os.replace(unfinished, target)
        _sync(folder)
        shutil.rmtree(replaced, ignore_errors=True)
        found = checkpoints_in(folder)
        newer = [path for path in found if path.name > target.name]  # a run that was thrown back does not come to them
        for old in [*newer, *[path for path in found if path not in newer][:-keep]]:
            (old / CHECKPOINT_MANIFEST).unlink()  # first, so that half of it never counts
            shutil.rmtree(old)
    except (OSError, UserError) as caught:
        return _explain(caught, folder, 0)
    return None


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


def _explain(error: BaseException, folder: Path, rank: int) -> str:
    """One line. DCP collects the exceptions of ranks in one of its own; the first that names a cause counts."""
    failures = getattr(error, "failures", None)
    if failures:
        rank, (inner, _) = next(iter(failures.items()))
        return _explain(inner, folder, rank)
    with contextlib.suppress(OSError):
        if shutil.disk_usage(folder).free < 1 << 20 or getattr(error, "errno", None) in (28, 122):
            return f"disk full ({folder}, rank {rank}); free space and --resume"
    text = (str(error) or type(error).__name__).splitlines()[0]
    return f"rank {rank}: {text[:200]}"


def _what_there_is(folder: Path) -> str:
    found = checkpoints_in(folder)
    return f"The last complete one is {found[-1].name}" if found else "There is no complete one"


def _gather(value: Any, rank: int, group: dist.ProcessGroup | None) -> list[Any]:
    if group is None:
        return [value]
    found: list[Any] | None = [None] * dist.get_world_size(group) if rank == 0 else None
    dist.gather_object(value, found, dst=0, group=group)
    return found or []


def _from_rank_0(value: Any, group: dist.ProcessGroup | None) -> Any:
    if group is None:
        return value
    holder = [value]
    dist.broadcast_object_list(holder, src=0, group=group)
    return holder[0]


def clear_remains(folder: Path) -> None:
    """What a crash left of writing: half a checkpoint goes; one that was about to be replaced comes back."""
    for old in folder.glob(".step-*.old"):
        target = folder / old.name.removeprefix(".").removesuffix(".old")
        if target.exists():
            shutil.rmtree(old, ignore_errors=True)
        else:
            os.replace(old, target)
    for unfinished in folder.glob(".step-*.tmp"):
        shutil.rmtree(unfinished, ignore_errors=True)


# ---- reading --------------------------------------------------------------------------------------------------------


def latest_checkpoint(folder: Path) -> Path | None:
    """The newest complete checkpoint, if there is one."""
    found = checkpoints_in(folder)
    return found[-1] if found else None


def read_description(path: Path) -> dict[str, Any]:
    """complete.json. Raises UserError where it is no checkpoint of this format."""
    try:
        description: dict[str, Any] = json.loads((path / CHECKPOINT_MANIFEST).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        raise UserError(f"checkpoint {path} is damaged ({CHECKPOINT_MANIFEST} is not JSON); remove it") from None
    if description.get("format") != FORMAT:
        raise UserError(
            f"checkpoint {path} is of format {description.get('format', 'bert_fast checkpoint 1')!r} and this code reads "
            f"{FORMAT!r}; go on with the code that wrote it, or start a new run"
        )
    return description


def damage(path: Path, rank: int = 0, world: int = 1) -> str | None:
    """What is wrong with this rank's share of a checkpoint's files (every `world`-th), by size and hash; None if nothing."""
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
    except UserError as error:
        return str(error)
    except (OSError, KeyError, TypeError) as error:
        return f"{type(error).__name__}: {error}"
    return None


def read_metadata(path: Path) -> Metadata:
    """DCP's list of the tensors in a checkpoint."""
    return dcp.FileSystemReader(path).read_metadata()


def read_stretches(path: Path, stretches: Sequence[Stretch]) -> None:
    """Fill the values of `stretches` (on any device); each rank by itself. Raises UserError for what is not there."""
    entries = read_metadata(path).state_dict_metadata
    for stretch in stretches:
        entry = entries.get(stretch.name)
        if entry is None:
            raise UserError(f"checkpoint {path} has no tensor {stretch.name}; it is of another model or optimizer")
        size = entry.size[0]  # type: ignore[union-attr]
        if size != stretch.numel:
            raise UserError(
                f"checkpoint {path} has {size:,} numbers in {stretch.name} and the model {stretch.numel:,}; it is of another "
                "model"
            )
    if stretches:
        dcp.load({}, storage_reader=dcp.FileSystemReader(path), planner=_Loading(stretches), no_dist=True)


def read_bytes(path: Path, metadata: Metadata, name: str) -> Any:
    """What `as_bytes` stored under `name`; None if there is no such entry."""
    entry = metadata.state_dict_metadata.get(name)
    if entry is None:
        return None
    values = torch.empty(entry.size[0], dtype=torch.uint8)  # type: ignore[union-attr]
    read_stretches(path, [Stretch(name, 0, len(values), values)])
    return torch.load(io.BytesIO(values.numpy().tobytes()), weights_only=True)
