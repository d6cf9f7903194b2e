"""`communication.bucket_mb: auto`: measure the backward and the link before the clock, and plan the buckets for them."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from torch import nn

from bert_fast.communication.bucket_record import BucketRecord, WeightRecord
from bert_fast.communication.buckets import Ordering
from bert_fast.communication.plan import Link, exact_plan, lower_bound, tabulate_link, timeline
from bert_fast.communication.plan_sharded import ShardedTimes, delays, sharded_plan
from bert_fast.communication.wire_format import WireFormat, start_gather, wire_format
from bert_fast.config import CommunicationConfig, Config
from bert_fast.integers import round_up
from bert_fast.train.collectives import barrier, broadcast_numbers, max_over_ranks
from bert_fast.train.environment import Environment
from bert_fast.train.telemetry.hardware import synchronize

_BACKWARDS = 4  # measured after a first one that prepares kernels
_SMALLEST = 2**16  # bytes of the smallest collective that is measured
_SIZES = 5
_REPEATS = 5
_UNMEASURED = 1e15  # bytes/s


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
        synchronize(environment.device)
        if number:
            passes.append([_seconds(start, marks.get(index, end)) for index in range(len(parameters))])
        for parameter in parameters:
            parameter.grad = None
    return np.median(np.array(passes), axis=0)


def measure_need_times(model: nn.Module, forward: Callable[[], torch.Tensor], environment: Environment) -> np.ndarray:
    """Seconds from the start of forward until a module that owns a parameter is first called: float64 [parameters]."""
    cuda = environment.device.type == "cuda"
    index_of = {id(parameter): index for index, parameter in enumerate(model.parameters())}
    marks: dict[int, Any] = {}

    def marker(own: list[int]) -> Callable[..., None]:
        def mark(*_: object) -> None:
            for index in own:
                marks.setdefault(index, _now(cuda))

        return mark

    handles = []
    for module in model.modules():
        own = [index_of[id(parameter)] for parameter in module.parameters(recurse=False)]
        if own:
            handles.append(module.register_forward_pre_hook(marker(own)))
    passes = []
    for number in range(1 + _BACKWARDS):
        marks.clear()
        start = _now(cuda)
        with torch.no_grad():
            forward()
        end = _now(cuda)
        synchronize(environment.device)
        if number:
            passes.append([_seconds(start, marks.get(index, end)) for index in range(len(index_of))])
    for handle in handles:
        handle.remove()
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


def all_reduce(buffer: torch.Tensor) -> None:
    """A blocking all-reduce, for `measure_link`."""
    dist.all_reduce(buffer)


def reduce_scatter(buffer: torch.Tensor) -> None:
    """The sharded variant's blocking reduce-scatter, for `measure_link`."""
    shard = buffer[: len(buffer) // dist.get_world_size()]
    for work in WireFormat(buffer.dtype).reduce_scatter(0, buffer, shard, None):
        work.wait()


def gather(buffer: torch.Tensor) -> None:
    """The sharded variant's blocking all-gather, for `measure_link`."""
    start_gather(buffer, 0, None).wait()


def measure_link(
    total_bytes: int,
    dtype: torch.dtype,
    environment: Environment,
    collective: Callable[[torch.Tensor], None] = all_reduce,
) -> Link:
    """The link of this run's ranks, measured from 64 KiB to all gradients (4 MiB at least). A collective.

    Args:
        collective: what is measured, over a buffer whose length the number of ranks divides.
    """
    sizes, seconds = [], []
    width = torch.empty((), dtype=dtype).element_size()
    grid = np.unique(np.geomspace(_SMALLEST, max(64 * _SMALLEST, total_bytes), _SIZES).astype(np.int64) // width)
    world = environment.world_size
    buffers = [torch.zeros(round_up(int(numel), world), dtype=dtype, device=environment.device) for numel in grid]
    for number in range(1 + _REPEATS):
        for buffer in buffers:
            barrier()
            synchronize(environment.device)
            start = time.perf_counter()
            collective(buffer)
            synchronize(environment.device)
            if number:
                sizes.append(buffer.numel() * width)
                seconds.append(time.perf_counter() - start)
    slowest = torch.tensor(seconds, dtype=torch.float64, device=environment.device)
    dist.all_reduce(slowest, op=dist.ReduceOp.MAX)  # the same times, and so the same outcome, on every rank
    try:
        return tabulate_link(sizes, slowest.tolist())
    except ValueError:  # a disturbed moment: plan as if latency were all there is, for few buckets
        return Link(float(slowest.median()), _UNMEASURED)


def measure_and_plan(
    config: Config,
    environment: Environment,
    model: nn.Module,
    ordering: Ordering,
    forward: Callable[[], torch.Tensor],
) -> BucketRecord:
    """Measure this run's backward and link, and plan its buckets. A collective; every rank gets rank 0's plan.

    Args:
        forward: the summed losses of a made-up micro-batch.
    """
    parameters = list(model.parameters())
    wire = wire_format(config.communication.reduce_dtype, parameters[0].dtype).dtype
    ready_s = measure_ready_times(parameters, forward, environment)
    needed_s = measure_need_times(model, forward, environment) if config.communication.shard_optimizer else None
    return plan_buckets(ordering, ready_s, config.communication, wire, environment, needed_s)


def plan_buckets(
    ordering: Ordering,
    ready_s: np.ndarray,
    config: CommunicationConfig,
    wire_dtype: torch.dtype,
    environment: Environment,
    needed_s: np.ndarray | None = None,
    link: Link | None = None,
) -> BucketRecord:
    """Measure the link and plan. A collective; every rank gets rank 0's plan.

    Args:
        ordering: of the gradients; a bucket holds whole units of it.
        ready_s: seconds at which this rank's gradients are ready, float64 [parameters].
        needed_s: seconds at which forward needs the weights, float64 [parameters]; for the sharded engine.
        link: what reduces gradients, if it is known; else it is measured where there are several ranks.
    """
    width = torch.empty((), dtype=wire_dtype).element_size()
    sizes = np.array([sum(ordering.numel[i] for i in unit) * width for unit in ordering.units])
    latest = np.array([max(float(ready_s[i]) for i in unit) for unit in ordering.units])
    ready = max_over_ranks(latest, environment.device)
    shards = config.shard_optimizer and environment.world_size > 1
    if environment.world_size > 1:
        collective = reduce_scatter if shards else all_reduce
        link = link or measure_link(int(sizes.sum()), wire_dtype, environment, collective)
    reduction = _Reduction(np.maximum.accumulate(ready), sizes, link or Link(0.0, _UNMEASURED))
    least, most = (mib * 2**20 * width / 4 for mib in (config.min_bucket_mb, config.max_bucket_mb))
    if not shards:
        plan = exact_plan(*reduction, min_bytes=least, max_bytes=most)
        return _record(ordering, reduction, _of_first_rank(plan.ends, len(sizes), environment))
    assert needed_s is not None
    earliest = np.array([min(float(needed_s[i]) for i in unit) for unit in ordering.units])
    needed = max_over_ranks(earliest, environment.device)
    gathering = measure_link(int(sizes.sum()) // width * 4, torch.float32, environment, gather)
    times = ShardedTimes(reduction.ready_s, needed, sizes, sizes / width * 4, reduction.link, gathering)
    planned = sharded_plan(times, min_bytes=least, max_bytes=most)
    ends = _of_first_rank(planned, len(sizes), environment)
    return _record(ordering, reduction, ends, WeightRecord(tuple(needed.tolist()), gathering, delays(times, ends)[1]))


class _Reduction(NamedTuple):
    """What a plan is made from, for each unit in the order of backward: seconds, bytes on the wire, and their link."""

    ready_s: np.ndarray
    sizes: np.ndarray
    link: Link


def _record(
    ordering: Ordering, reduction: _Reduction, ends: list[int], weights: WeightRecord | None = None
) -> BucketRecord:
    """The buckets with these ends, and when their collectives begin and end."""
    ready_s, sizes, link = reduction
    plan, bound = timeline(ready_s, sizes, ends, link), lower_bound(ready_s, sizes, link)
    return BucketRecord(ordering.unit_names, tuple(ready_s.tolist()), tuple(sizes.tolist()), link, plan, bound, weights)


def _of_first_rank(ends: Sequence[int], count: int, environment: Environment) -> list[int]:
    """Rank 0's ends: processors may round differently, and all ranks must have the same buckets."""
    padded = [*ends, *[0] * (count + 1 - len(ends))]
    return [int(end) for end in broadcast_numbers(padded, environment.device, torch.int64) if end]
