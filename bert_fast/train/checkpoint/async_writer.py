"""Checkpoints beside training: the copy overlaps the next forward and backward, the writing whatever comes after.

Weights and moments change in the optimizer's update alone. So a step that begins while a checkpoint is copied need only
wait before its update (`before_update`); on CUDA not even the host waits, the stream does.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from bert_fast.errors import UserError
from bert_fast.train.checkpoint.snapshot import rank_name
from bert_fast.train.checkpoint.storage import TensorSlice, as_bytes, write_checkpoint
from bert_fast.train.environment import Environment

_LATER_S = 30.0  # than heartbeats, which know who is late, do collectives give up


def saving_group(environment: Environment, timeout_s: float) -> dist.ProcessGroup | None:
    """A group for a background thread's collectives: beside those of training, they need one of their own. A collective.

    Args:
        timeout_s: what a rank may take to write its part; heartbeats watch that, the group itself waits a little longer.
    """
    if not dist.is_initialized() or environment.world_size == 1:
        return None
    backend = "gloo" if dist.get_backend() == "nccl" else None
    return dist.new_group(backend=backend, timeout=timedelta(seconds=timeout_s + _LATER_S))


class OwnWork:
    """A context around what a rank does alone, in one thread; another thread may ask for how long it has lasted."""

    def __init__(self) -> None:
        self._since: float | None = None

    def __enter__(self) -> None:
        self._since = time.monotonic()

    def __exit__(self, *_: object) -> None:
        self._since = None

    def seconds(self) -> float:
        """0 outside of it."""
        since = self._since
        return 0.0 if since is None else time.monotonic() - since


class AsyncCheckpointWriter:
    """Writes checkpoints of one run, one at a time."""

    def __init__(self, folder: Path, environment: Environment, keep: int, group: dist.ProcessGroup | None) -> None:
        self._folder, self._environment, self._keep, self._group = folder, environment, keep, group
        self._thread: threading.Thread | None = None
        self._copied = threading.Event()
        self._copied.set()
        self._buffers: dict[tuple[str, int], torch.Tensor] = {}
        self._stream = torch.cuda.Stream(environment.device) if environment.device.type == "cuda" else None
        self._event: torch.cuda.Event | None = None
        self._error: Exception | None = None
        self.own_work = OwnWork()  # on a checkpoint: no other rank is waited for
        self.records: list[dict[str, Any]] = []  # of every checkpoint: the fields of report.schema.CheckpointTimes

    @property
    def failed(self) -> str | None:
        """Why a checkpoint could not be written; `wait` raises then."""
        return None if self._error is None else str(self._error)

    def start(
        self,
        slices: Sequence[TensorSlice],
        own: dict[str, Any],
        description: dict[str, Any],
        began: float | None = None,
    ) -> None:
        """Begin to write a checkpoint; waits for the one before. All ranks call it at the same step.

        Args:
            slices: views that do not change before `before_update` returns.
            own: this rank's own state, which belongs to the writer from now on.
            began: when training began to wait for this checkpoint (`time.perf_counter`), if that was before the call.
        """
        began = time.perf_counter() if began is None else began
        self.wait()
        record = {"step": float(description["step"]), "stall_s": 0.0, "copy_s": 0.0, "total_s": 0.0}
        self.records.append(record)
        self._copied.clear()
        copies = [TensorSlice(s.name, s.begin, s.numel, self._buffer(s)) for s in slices]
        if self._stream is not None:
            self._stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self._stream):
                for copy, piece in zip(copies, slices, strict=True):
                    copy.values.copy_(piece.values, non_blocking=True)
                self._event = torch.cuda.Event()
                self._event.record()
        self._thread = threading.Thread(
            target=self._write,
            args=(list(slices), copies, own, description, record, began),
            daemon=True,
            name="checkpoint-writer",
        )
        self._thread.start()
        record["stall_s"] += time.perf_counter() - began

    def before_update(self) -> None:
        """Wait until nothing that is about to change has still to be copied. Call before weights or moments change."""
        if self._copied.is_set():
            return
        if self._event is not None:
            torch.cuda.current_stream().wait_event(self._event)
            return
        began = time.perf_counter()
        self._copied.wait()
        self.records[-1]["stall_s"] += time.perf_counter() - began

    def wait(self) -> None:
        """Wait for the checkpoint that is being written.

        Raises:
            UserError: it, or one before, could not be written.
            RuntimeError: another rank was lost meanwhile.
        """
        if self._thread is not None:
            began = time.perf_counter()
            self._thread.join()
            self._thread = None
            self.records[-1]["stall_s"] += time.perf_counter() - began
        if self._error is not None:
            raise self._error

    def _buffer(self, piece: TensorSlice) -> torch.Tensor:
        """Host memory for a copy, kept from checkpoint to checkpoint; pinned on CUDA."""
        key = (piece.name, piece.begin)
        buffer = self._buffers.get(key)
        if buffer is None or len(buffer) != len(piece.values):
            buffer = torch.empty(len(piece.values), dtype=piece.values.dtype, pin_memory=self._stream is not None)
            self._buffers[key] = buffer
        return buffer

    def _write(
        self,
        slices: list[TensorSlice],
        copies: list[TensorSlice],
        own: dict[str, Any],
        description: dict[str, Any],
        record: dict[str, float],
        began: float,
    ) -> None:
        rank = self._environment.rank
        try:
            if self._stream is not None:
                torch.cuda.set_device(self._environment.device)  # a new thread's is GPU 0
            if self._event is not None:
                self._event.synchronize()
            else:
                for copy, piece in zip(copies, slices, strict=True):
                    copy.values.copy_(piece.values)
            record["copy_s"] = time.perf_counter() - began
            self._copied.set()
            mine = [*copies, as_bytes(rank_name(rank), own)]
            write_checkpoint(self._folder, mine, description, rank, self._keep, self._group, self.own_work)
            record["total_s"] = time.perf_counter() - began
        except UserError as error:
            self._error = error
        except Exception as error:  # of a collective: another rank is gone, which the step will notice too
            text = (str(error) or type(error).__name__).splitlines()[0]
            self._error = RuntimeError(f"checkpoint of step {description['step']} was not written: {text[:200]}")
        finally:
            self._copied.set()
