"""Collectives over values, numbers and JSON. Without a process group each of them does what it does for one rank.

Plain values travel as JSON in byte tensors: torch's collectives of objects unpickle, and so run, what they get.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from bert_fast.errors import UserError

_LIMIT = 1 << 30  # bytes of a value: what is longer was not sent by one of our ranks


def barrier() -> None:
    """Wait for all ranks. A collective."""
    if dist.is_initialized():
        dist.barrier()


def broadcast_value(value: Any, rank: int = 0) -> Any:
    """A rank's `value` (plain, as JSON), on every rank. A collective."""
    return broadcast_json(value, rank) if dist.is_initialized() else value


def gather_values(value: Any) -> list[Any]:
    """Every rank's `value` (plain, as JSON), on every rank. A collective."""
    return all_gather_json(value) if dist.is_initialized() else [value]


def broadcast_numbers(values: Sequence[float], device: torch.device, dtype: torch.dtype = torch.float64) -> list[float]:
    """Rank 0's `values` on every rank; each rank must have as many. A collective.

    What is computed in floating point on every rank may be rounded differently: all ranks then go on with rank 0's.
    """
    shared = torch.tensor(values, dtype=dtype, device=device)
    if dist.is_initialized():
        dist.broadcast(shared, 0)
    numbers: list[float] = shared.tolist()
    return numbers


def gather_floats(values: list[float], device: torch.device) -> np.ndarray:
    """Every rank's `values`, float64 [ranks, len(values)], on every rank. A collective."""
    mine = torch.tensor(values, dtype=torch.float64, device=device)
    if not dist.is_initialized():
        return mine.cpu().numpy()[None]
    everyone = [torch.empty_like(mine) for _ in range(dist.get_world_size())]
    dist.all_gather(everyone, mine)
    return torch.stack(everyone).cpu().numpy()


def max_over_ranks(values: np.ndarray, device: torch.device) -> np.ndarray:
    """The largest of all ranks' `values`, entry by entry, float64. A collective."""
    shared = torch.tensor(values, dtype=torch.float64, device=device)
    if dist.is_initialized():
        dist.all_reduce(shared, op=dist.ReduceOp.MAX)
    return shared.cpu().numpy()


def broadcast_json(value: Any, src: int = 0, group: dist.ProcessGroup | None = None) -> Any:
    """The `value` of rank `src`, on every rank, as JSON brings it back (tuples become lists). A collective."""
    mine = _encoded(value, group)
    size = torch.tensor([len(mine)], device=mine.device)
    dist.broadcast(size, src, group=group)
    content = mine if dist.get_rank() == src else mine.new_zeros(_checked(int(size)))
    dist.broadcast(content, src, group=group)
    return _decoded(content)


def all_gather_json(value: Any, group: dist.ProcessGroup | None = None) -> list[Any]:
    """Every rank's `value`, by rank, on every rank. A collective."""
    sizes, mine = _sizes(value, group)
    everyone = [torch.empty_like(mine) for _ in sizes]
    dist.all_gather(everyone, mine, group=group)
    return [_decoded(each[:size]) for each, size in zip(everyone, sizes, strict=True)]


def gather_json(value: Any, group: dist.ProcessGroup | None = None) -> list[Any]:
    """Every rank's `value`, by rank, on rank 0; empty on the others. A collective."""
    sizes, mine = _sizes(value, group)
    if dist.get_rank() != 0:
        dist.gather(mine, None, 0, group=group)
        return []
    everyone = [torch.empty_like(mine) for _ in sizes]
    dist.gather(mine, everyone, 0, group=group)
    return [_decoded(each[:size]) for each, size in zip(everyone, sizes, strict=True)]


def _sizes(value: Any, group: dist.ProcessGroup | None) -> tuple[list[int], torch.Tensor]:
    """The length of every rank's value, and this rank's, filled up to the longest. A collective."""
    mine = _encoded(value, group)
    size = torch.tensor([len(mine)], device=mine.device)
    everyone = [size.clone() for _ in range(dist.get_world_size(group))]
    dist.all_gather(everyone, size, group=group)
    sizes = [_checked(int(each)) for each in everyone]
    return sizes, torch.nn.functional.pad(mine, (0, max(sizes) - len(mine)))


def _encoded(value: Any, group: dist.ProcessGroup | None) -> torch.Tensor:
    content = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)
    on_gpu = dist.get_backend(group) == "nccl"
    return content.to(torch.device("cuda", torch.cuda.current_device())) if on_gpu else content


def _decoded(content: torch.Tensor) -> Any:
    try:
        return json.loads(content.cpu().numpy().tobytes())
    except ValueError:
        raise UserError(
            "a rank sent something else than JSON: it does not run this code; start all ranks with the same"
        ) from None


def _checked(size: int) -> int:
    if not 0 < size <= _LIMIT:
        raise UserError(f"a rank announced {size:,} bytes: it does not run this code; start all ranks with the same")
    return size
