"""`communication.bucket_mb: auto`: measure the backward and the link before the clock, and plan the buckets for them."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import nn

from bert_fast.communication.buckets import Layout
from bert_fast.communication.compress import WireFormat
from bert_fast.communication.plan import BucketPlan, Link, exact_plan, fit_link, lower_bound, timeline
from bert_fast.config import CommunicationConfig
from bert_fast.train.environment import Environment

_BACKWARDS = 4  # measured after a first one that prepares kernels
_SMALLEST = 2**16  # bytes of the smallest collective that is measured
_SIZES = 5
_REPEATS = 5
_UNMEASURED = 1e15  # bytes/s


@dataclass(frozen=True)
class BucketRecord:
    """What `auto` measured and chose. Times in seconds from the start of backward, of the latest rank."""

    units: tuple[str, ...]
    ready_s: tuple[float, ...]
    bytes: tuple[int, ...]
    link: Link
    plan: BucketPlan
    lower_bound_s: float

    def bucket_mb(self, element_bytes: int = 4, wire_bytes: int = 4) -> list[float]:
        """The plan as a list for `communication.bucket_mb` (MiB of gradients, exactly)."""
        edges = [0, *self.plan.ends]
        sizes = [sum(self.bytes[a:b]) for a, b in pairwise(edges)]
        return [size // wire_bytes * element_bytes / 2**20 for size in sizes]

    def summary(self) -> str:
        """One line for the log."""
        link = f"{1e3 * self.link.latency_s:.2f} ms + {self.link.bytes_per_s / 1e6:,.0f} MB/s"
        return (
            f"buckets: {len(self.plan.ends)} for a backward of {1e3 * self.ready_s[-1]:.1f} ms and a link of {link}; predicted "
            f"exposed communication {1e3 * self.plan.exposed_s:.2f} ms, at least {1e3 * self.lower_bound_s:.2f} ms"
        )

    def as_json(self) -> dict[str, Any]:
        """For `scripts/plan_buckets.py --trace --link`."""
        return {
            "units": [
                {"name": name, "ready_s": ready, "bytes": size}
                for name, ready, size in zip(self.units, self.ready_s, self.bytes, strict=True)
            ],
            "link": {"latency_s": self.link.latency_s, "bytes_per_s": self.link.bytes_per_s},
            "ends": list(self.plan.ends),
            "predicted_exposed_s": self.plan.exposed_s,
            "lower_bound_s": self.lower_bound_s,
        }


def measure_ready_times(
    parameters: Sequence[nn.Parameter], forward: Callable[[], torch.Tensor], environment: Environment
) -> np.ndarray:
    """Seconds from the start of backward to each parameter's gradient: float64 [parameters], median over passes.

    No communication goes on. On CUDA by events on the stream. Unused parameters are ready at the end.
    """
    cuda = environment.device.type == "cuda"
    passes = []
    for number in range(1 + _BACKWARDS):
        marks: dict[int, Any] = {}
        handles = [p.register_post_accumulate_grad_hook(_marker(marks, i, cuda)) for i, p in enumerate(parameters)]
        loss = forward()
        start = _now(cuda)
        loss.backward()
        end = _now(cuda)
        for handle in handles:
            handle.remove()
        if cuda:
            torch.cuda.synchronize()
        if number:
            passes.append([_seconds(start, marks.get(index, end)) for index in range(len(parameters))])
        for parameter in parameters:
            parameter.grad = None
    return np.median(np.array(passes), axis=0)


def _marker(marks: dict[int, Any], index: int, cuda: bool) -> Callable[[torch.Tensor], None]:
    def mark(_parameter: torch.Tensor) -> None:
        marks[index] = _now(cuda)

    return mark


def _now(cuda: bool) -> Any:
    if not cuda:
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def _seconds(start: Any, end: Any) -> float:
    return end - start if isinstance(start, float) else start.elapsed_time(end) / 1e3


def measure_link(total_bytes: int, dtype: torch.dtype, environment: Environment, scatter: bool = False) -> Link:
    """Fit latency and bandwidth of all-reduces of this run's ranks, from 64 KiB to all gradients (4 MiB at least).

    A collective. With `scatter` of the sharded variant's reduce-scatters, by the bytes that go in.
    """
    sizes, seconds = [], []
    width = torch.empty((), dtype=dtype).element_size()
    grid = np.unique(np.geomspace(_SMALLEST, max(64 * _SMALLEST, total_bytes), _SIZES).astype(np.int64) // width)
    world = environment.world_size
    buffers = [torch.zeros(-(-int(numel) // world) * world, dtype=dtype, device=environment.device) for numel in grid]
    wire = WireFormat(dtype)
    for number in range(1 + _REPEATS):
        for buffer in buffers:
            dist.barrier()
            _wait(environment)
            start = time.perf_counter()
            if scatter:
                works = wire.reduce_scatter(0, buffer, buffer[: len(buffer) // world], None)
            else:
                works = wire.all_reduce(0, buffer, buffer, None)
            for work in works:
                work.wait()
            _wait(environment)
            if number:
                sizes.append(buffer.numel() * width)
                seconds.append(time.perf_counter() - start)
    slowest = torch.tensor(seconds, dtype=torch.float64, device=environment.device)
    dist.all_reduce(slowest, op=dist.ReduceOp.MAX)  # the same times, and so the same outcome, on every rank
    try:
        return fit_link(sizes, slowest.tolist())
    except ValueError:  # a disturbed moment: plan as if latency were all there is, for few buckets
        return Link(float(slowest.median()), _UNMEASURED)


def _wait(environment: Environment) -> None:
    if environment.device.type == "cuda":
        torch.cuda.synchronize()


def plan_buckets(
    layout: Layout, ready_s: np.ndarray, config: CommunicationConfig, wire_dtype: torch.dtype, environment: Environment
) -> BucketRecord:
    """Measure the link and plan. A collective; every rank gets rank 0's plan.

    Args:
        layout: with any buckets; its clip groups, and its order of parameters.
        ready_s: this rank's [parameters].
    """
    whole = config.clip == "bucket_before_reduce"
    members = [group.parameters for group in layout.groups] if whole else [(index,) for index in layout.order]
    names = [group.name for group in layout.groups] if whole else [layout.names[index] for index in layout.order]
    width = torch.empty((), dtype=wire_dtype).element_size()
    sizes = [sum(layout.numel[i] for i in unit) * width for unit in members]
    ready = torch.tensor([max(float(ready_s[i]) for i in unit) for unit in members], dtype=torch.float64)
    link = Link(0.0, _UNMEASURED)
    if environment.world_size > 1:
        ready = ready.to(environment.device)
        dist.all_reduce(ready, op=dist.ReduceOp.MAX)
        link = measure_link(sum(sizes), wire_dtype, environment, scatter=config.shard_optimizer)
        shared = torch.tensor([link.latency_s, link.bytes_per_s], dtype=torch.float64, device=environment.device)
        dist.broadcast(shared, 0)
        link = Link(*shared.tolist())
    times = np.maximum.accumulate(ready.cpu().numpy())
    limits = {
        "min_bytes": config.min_bucket_mb * 2**20 * width / 4,
        "max_bytes": config.max_bucket_mb * 2**20 * width / 4,
    }
    plan = exact_plan(times, np.array(sizes), link, **limits)
    if environment.world_size > 1:  # processors may round differently, and all ranks must have the same buckets
        ends = torch.zeros(len(sizes) + 1, dtype=torch.int64, device=environment.device)
        ends[: len(plan.ends)] = torch.tensor(plan.ends, device=environment.device)
        dist.broadcast(ends, 0)
        chosen = [end for end in ends.tolist() if end]
        if chosen != list(plan.ends):
            plan = timeline(times, np.array(sizes), chosen, link)
    return BucketRecord(
        tuple(names), tuple(times.tolist()), tuple(sizes), link, plan, lower_bound(times, np.array(sizes), link)
    )
