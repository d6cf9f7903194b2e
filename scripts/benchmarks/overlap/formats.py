"""What a host does with `--formats`: a step with every wire format in turn, what of its communication is hidden, what it sends.

The model is eight equal square matrices, so that all formats have something to compress, and its gradients are random. Momentum
formats send momentum from the second step on. A format's communication alone is its step with passes that take no time.
"""

from __future__ import annotations

import json
import os
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from bert_fast.communication.buckets import measure_ready_order, plan_layout
from bert_fast.communication.engine import Engine
from bert_fast.communication.onebit import OneBit
from bert_fast.communication.plan import exact_plan
from bert_fast.communication.reducer import BucketReducer
from bert_fast.communication.wire_format import wire_format
from bert_fast.config import OptimizerConfig
from bert_fast.model.objective import MlmNsp
from bert_fast.report.bench import markdown_table
from bert_fast.train.environment import Environment
from bert_fast.train.rank_optimizer import RankOptimizer
from bert_fast.train.setup.bucket_sizes import all_reduce, measure_link
from bert_fast.train.setup.build import pair_with_wire
from bert_fast.train.step import StepInput, TrainStep

from .report import YARDSTICK
from .variants import measure_passes, shared_ends, without_engine
from .waiting import UPDATE_SHARE, Unit, WaitingModel, numel_of, slow_updates, units_of

SETTINGS: dict[str, dict[str, Any]] = {
    "powersgd": {"powersgd_rank": 4},
    "onebit": {"exact_steps": 1},
}
PAIRED = {"onebit": "onebit_adam"}
# Bytes of a number, for the plan of buckets. A lossy format has a bucket for each layer: it sends so little that its time is
# that of encoding, which begins as soon as a bucket is full.
_WIDTHS = {"fp32": 4, "bf16": 2}


@dataclass
class _Instance:
    step: Callable[[], None]
    engine: Engine
    samples: list[float] = field(default_factory=list)
    host: list[float] = field(default_factory=list)
    sent: list[int] = field(default_factory=list)  # as the engine counts
    on_interface: list[int] = field(default_factory=list)


def work(settings: dict[str, Any]) -> None:
    """Rank 0 prints JSON: samples in ms and bytes of every format.

    Args:
        settings: ratio (communication of bf16 over backward), formats, repeats.
    """
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    rank, world = dist.get_rank(), dist.get_world_size()
    cpu = Environment(rank, rank, world, torch.device("cpu"), torch.float32)
    total = numel_of("layers")
    link = measure_link(total * 4, torch.float32, cpu, all_reduce)
    backward_s = float(link(total * 2)) / settings["ratio"]
    units, instant = units_of("layers", backward_s), units_of("layers", 0.0)
    passes = measure_passes(units, cpu)
    instances: dict[str, _Instance] = {}
    for name in settings["formats"]:
        ends = list(range(1, len(units) + 1))
        if name in _WIDTHS:
            sizes = np.array([unit.numel * _WIDTHS[name] for unit in units[::-1]], dtype=float)
            ends = shared_ends(exact_plan(passes.ready_s, sizes, link).ends, len(units))
        instances[name] = _make(name, units, ends)
        instances[f"{name} alone"] = _make(name, instant, ends)
    alone, _ = without_engine(units, as_matrices=True)
    compute: list[float] = []
    for number in range(2 + settings["repeats"]):  # the first makes the state, the second is a format's first
        dist.barrier()
        start = time.perf_counter()
        alone()
        compute.append(1e3 * (time.perf_counter() - start))
        for instance in instances.values():
            _measure(instance, number >= 2)
    if rank == 0:
        print(
            json.dumps({
                "compute_ms": statistics.median(compute),
                "backward_ms": 1e3 * backward_s,
                "link": [1e3 * link.latency_s, link.bytes_per_s / 1e6],
                "gradient_bytes": 4 * total,
                "formats": {
                    name: {key: value for key, value in vars(each).items() if isinstance(value, list)}
                    | {"buckets": len(each.engine.layout.buckets)}
                    for name, each in instances.items()
                },
            })
        )  # fmt: skip
    dist.barrier()
    dist.destroy_process_group()


def _make(name: str, units: list[Unit], ends: list[int]) -> _Instance:
    """A training step of a format with buckets that end after so many units, in ready order."""
    torch.manual_seed(dist.get_rank())
    model = WaitingModel(units, as_matrices=True)
    parameters, x = list(model.parameters()), torch.zeros(1, requires_grad=True)
    order = measure_ready_order(parameters, lambda: model(x).mlm_sum.backward())
    sizes = [unit.numel * 4 / 2**20 for unit in units[::-1]]
    layout = plan_layout(
        [n for n, _ in model.named_parameters()], [p.numel() for p in parameters], order, clip_groups="layer",
        bucket_mb=[sum(sizes[a:b]) for a, b in zip([0, *ends[:-1]], ends, strict=True)], whole_groups=True,
        shards=dist.get_world_size(),
    )  # fmt: skip
    for parameter in parameters:
        parameter.grad = None
    wire = wire_format(name, torch.float32, **SETTINGS.get(name, {}))
    engine = BucketReducer(model, layout, clip="bucket_before_reduce", max_norm=1.0, wire=wire)
    config = OptimizerConfig(name=PAIRED.get(name, "adamw"), lr=1e-3)
    optimizer = RankOptimizer(engine, list(model.named_parameters()), config).optimizer
    if isinstance(wire, OneBit):
        pair_with_wire(wire, optimizer, parameters)
    slow_updates(optimizer, sum(u.numel for u in units), UPDATE_SHARE * sum(u.backward_s for u in units))
    step = TrainStep(
        engine, optimizer, MlmNsp(), device=torch.device("cpu"), dtype=torch.float32, world_size=dist.get_world_size(),
        loss_scale=None,
    )  # fmt: skip
    inputs = StepInput([x], 1, 1)  # type: ignore[list-item]

    def cycle() -> None:
        assert bool(step(inputs, 1e-3).is_finite)

    return _Instance(cycle, engine)


def _measure(instance: _Instance, counts: bool) -> None:
    instance.engine.reset_counters()
    dist.barrier()
    sent, host, start = _sent_on_interface(), time.process_time(), time.perf_counter()
    instance.step()
    seconds = torch.tensor([time.perf_counter() - start, time.process_time() - host], dtype=torch.float64)
    sent = _sent_on_interface() - sent
    dist.all_reduce(seconds, op=dist.ReduceOp.MAX)
    if counts:
        instance.samples.append(1e3 * float(seconds[0]))
        instance.host.append(1e3 * float(seconds[1]))
        instance.sent.append(instance.engine.counters()["gradient_bytes"])
        instance.on_interface.append(sent)


def _sent_on_interface() -> int:
    """Bytes that left this host so far, with headers; what the kernel still holds is not among them."""
    return int(Path("/sys/class/net", os.environ["GLOO_SOCKET_IFNAME"], "statistics/tx_bytes").read_text())


def metrics_of(record: dict[str, Any]) -> dict[str, dict[str, float]]:
    """Of every format: step, exposed time, communication alone, host time of a step in ms; bytes; hidden share; ratios.

    Args:
        record: what `work` prints.
    """
    middle = {name: statistics.median(each["samples"]) for name, each in record["formats"].items()}
    formats = record["formats"]
    found = {}
    for name in (name for name in middle if not name.endswith(" alone")):
        communication = middle[f"{name} alone"]
        hidden = record["compute_ms"] + communication - middle[name]
        on_interface = statistics.median(formats[f"{name} alone"]["on_interface"])
        found[name] = {
            "step_ms": middle[name],
            "exposed_ms": middle[name] - record["compute_ms"],
            "alone_ms": communication,
            "host_ms": statistics.median(formats[name]["host"]),
            "bytes": statistics.median(formats[name]["sent"]),
            "interface_bytes": on_interface,
            "bytes_ratio": statistics.median(formats[name]["sent"]) / record["gradient_bytes"],
            "hidden_share": hidden / min(record["backward_ms"], communication),
        }
    for values in found.values():
        if "fp32" in found:
            values["interface_ratio"] = values["interface_bytes"] / found["fp32"]["interface_bytes"]
        if YARDSTICK in found:
            values[f"{YARDSTICK}_over_it"] = found[YARDSTICK]["step_ms"] / values["step_ms"]
    return found


def table_of(title: str, record: dict[str, Any], by_format: dict[str, dict[str, float]]) -> str:
    """A Markdown table, one row per format."""
    rows = [
        (
            name,
            record["formats"][name]["buckets"],
            f"{values['step_ms']:,.0f}",
            f"{min(record['formats'][name]['samples']):,.0f}-{max(record['formats'][name]['samples']):,.0f}",
            f"{values[f'{YARDSTICK}_over_it']:.2f}" if YARDSTICK in by_format else "-",
            f"{values['exposed_ms']:,.0f}",
            f"{values['alone_ms']:,.0f}",
            f"{100 * values['hidden_share']:.0f} %",
            f"{values['host_ms']:,.0f}",
            f"{values['bytes_ratio']:.4f}",
            f"{values['interface_ratio']:.4f}" if "interface_ratio" in values else "-",
        )
        for name, values in by_format.items()
    ]
    headers = (
        "format", "buckets", "step ms", "range", f"{YARDSTICK} over it", "exposed ms", "alone ms", "hidden", "host ms",
        "bytes / fp32", "on the interface",
    )  # fmt: skip
    return f"### {title}\n\n{markdown_table(headers, rows)}\n"


def title_of(hosts: int, link: str, ratio: float, record: dict[str, Any]) -> str:
    latency, rate = record["link"]
    return (
        f"{hosts} hosts, {link}, ratio {ratio:g}: a step without communication {record['compute_ms']:,.0f} ms, of that "
        f"backward {record['backward_ms']:,.0f}; link {latency:.1f} ms + {rate:.1f} MB/s"
    )
