"""What a host does: measure all variants of one link and ratio, in turn."""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import torch
import torch.distributed as dist

from bert_fast.trace import Trace
from bert_fast.train.environment import Environment
from bert_fast.train.setup.bucket_sizes import all_reduce, gather, measure_link, reduce_scatter

from .prediction import lower_bound, measure_host, predict
from .variants import VARIANTS, Instance, Links, Variant, make, measure_passes, plan_ends, without_engine
from .waiting import FORWARD_SHARE, UPDATE_SHARE, numel_of, scale_of, units_of

_TRACED = ("one_bucket", "25mib", "auto", "auto_shadow", "auto_sharded_shadow")


def work(settings: dict[str, Any]) -> None:
    """Rank 0 prints JSON: samples in ms, predictions, spans of a traced cycle.

    Args:
        settings: model, ratio (communication over backward), variants, repeats.
    """
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    rank, world = dist.get_rank(), dist.get_world_size()
    cpu = Environment(rank, rank, world, torch.device("cpu"), torch.float32)
    model, total = settings["model"], numel_of(settings["model"])
    links = Links(*(measure_link(total * 4, torch.float32, cpu, way) for way in (all_reduce, reduce_scatter, gather)))
    backward_s = float(links.all_reduce(total * 4)) / settings["ratio"]
    units = units_of(model, backward_s)
    passes = measure_passes(units, cpu)
    alone, backward = without_engine(units)
    cycles: dict[str, Callable[[], None]] = {"compute": alone, "communication": _communication(total)}
    instances: dict[str, Instance] = {}
    predicted, bounds = {}, {}
    left: dict[tuple[str, str], list[float]] = {}  # of single units, by clipping and format
    for name in settings["variants"]:
        variant = VARIANTS[name]
        ends = plan_ends(variant, units, links, scale_of(model), passes)
        instances[name] = make(variant, units, ends)
        cycles[name] = instances[name].cycle
        host = _latest(measure_host(make(variant, units, ends, silent=True)))
        waits = [FORWARD_SHARE * unit.backward_s for unit in units[::-1]]
        forward = [sum(waits[a:b]) for a, b in pairwise([0, *ends])]
        predicted[name] = predict(instances[name], host, links, forward, UPDATE_SHARE * backward_s)
        if variant.buckets == "auto" and not variant.shard and variant.clip != "global_before_reduce":
            key = (variant.clip, variant.wire)
            if key not in left:
                single = make(
                    Variant(clip=variant.clip, wire=variant.wire), units, list(range(1, len(units) + 1)), silent=True
                )
                left[key] = _latest(measure_host(single))["left"]
            width = 2 if variant.wire == "bf16" else 4
            sizes = [unit.numel * width for unit in units[::-1]]
            bounds[name] = lower_bound(instances[name], host, links, sizes, left[key])
    samples: dict[str, list[float]] = {name: [] for name in cycles}
    for number in range(1 + settings["repeats"]):
        for name, cycle in cycles.items():
            instance = instances.get(name)
            before = 0
            if (
                instance is not None
            ):  # DDP learns its buckets in its first steps; a sharded step begins in the one before
                before = 3 * (instance.variant.engine == "ddp" and number == 0) + instance.variant.shard
            dist.barrier()
            for _ in range(before):
                cycle()
            start = time.perf_counter()
            cycle()
            seconds = torch.tensor(time.perf_counter() - start, dtype=torch.float64)
            if instance is not None:
                instance.wait_pending()
            dist.all_reduce(seconds, op=dist.ReduceOp.MAX)
            if number:
                samples[name].append(1e3 * float(seconds))
    traces = {name: _trace(instances[name]) for name in _TRACED if name in instances}
    if rank == 0:
        print(
            json.dumps(
                {
                    "samples": samples,
                    "predicted_ms": {k: 1e3 * v for k, v in predicted.items()},
                    "bound_ms": {k: 1e3 * v for k, v in bounds.items()},
                    "buckets": {k: len(v.numel) for k, v in instances.items()},
                    "backward_ms": 1e3 * statistics.median(backward),
                    "traces": traces,
                    "links": {k: [1e3 * v.latency_s, v.bytes_per_s / 1e6] for k, v in vars(links).items()},
                }
            )
        )
    dist.barrier()
    dist.destroy_process_group()


def _communication(numel: int) -> Callable[[], None]:
    buffer = torch.zeros(numel)
    return lambda: dist.all_reduce(buffer)


def _latest(host: dict[str, Any]) -> dict[str, Any]:
    """The slowest rank's times."""
    flat = torch.tensor([*host["left"], host["backward"], host["end"]], dtype=torch.float64)
    dist.all_reduce(flat, op=dist.ReduceOp.MAX)
    *left, backward, end = flat.tolist()
    return {"left": left, "backward": backward, "end": end}


def _trace(instance: Instance) -> list[tuple[str, str, float, float]]:
    """Spans of one cycle (a sharded one with the exchange of weights of the cycle before)."""
    assert instance.step is not None
    dist.barrier()
    trace = Trace()
    if instance.variant.shard:
        instance.step.set_trace(Trace())
        instance.cycle()
        trace = Trace()
        instance.engine.set_trace(trace)
    instance.step.set_trace(trace)
    instance.cycle()
    end = time.perf_counter()
    instance.wait_pending()
    instance.step.set_trace(None)
    length = end - trace._origin
    return [tuple(span) for span in trace.spans() if span.start < length]  # type: ignore[misc]
