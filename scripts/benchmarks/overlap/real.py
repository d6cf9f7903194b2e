"""The mode with the real model: the product's own step, computed on this CPU, over the same slow links."""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

from bert_fast.config import Config
from bert_fast.config.load import config_from_tree
from bert_fast.train.components import TrainComponents
from bert_fast.train.environment import Environment
from bert_fast.train.setup.bucket_sizes import all_reduce, measure_link
from bert_fast.train.setup.build import build
from bert_fast.train.setup.warmup import synthetic_input

from .variants import VARIANTS, SilentWire, Variant

# 6.3 million parameters, 24 MiB of gradients: large enough for several buckets, small enough for a core a rank
MODEL = {
    "vocab_size": 4096,
    "hidden_size": 256,
    "num_layers": 6,
    "num_heads": 4,
    "intermediate_size": 1024,
    "max_positions": 128,
}


def config_of(variant: Variant, world: int) -> Config:
    """The product's config of a variant."""
    buckets = [1.0, 25.0] if variant.buckets == "default" else variant.buckets
    return config_from_tree(
        {
            "run": {"measure_peak_flops": False, "tensorboard": False},
            "model": MODEL,
            "data": {"train": "none", "max_seq_len": 128},
            "batch": {"global_batch_size": 8 * world, "micro_batch_size": 8},
            "communication": {
                "engine": variant.engine,
                "bucket_mb": buckets,
                "clip": variant.clip,
                "reduce_dtype": variant.wire,
                "shard_optimizer": variant.shard,
            },
            "optimizer": {"name": "lamb", "lr": 1e-3, "step_per_bucket": variant.step_per_bucket},
            "schedule": {"total_steps": 1000},
            "train": {"precision": "fp32", "max_steps": 100, "warmup_batches": 2},
            "evaluation": {"data": "none", "every_samples": 10_000},
            "system": {"world_size": world, "device": "cpu", "threads_per_rank": 1},
            "mlperf": {"enabled": False},
        }
    )


def work(settings: dict[str, Any]) -> None:
    """As `worker.work`, without predictions beside what `auto` itself predicts."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    rank, world = dist.get_rank(), dist.get_world_size()
    cpu = Environment(rank, rank, world, torch.device("cpu"), torch.float32)
    machines: dict[str, TrainComponents] = {}
    cycles: dict[str, Callable[[], Any]] = {}
    for name in ["compute", *settings["variants"]]:
        config = config_of(Variant(buckets="auto") if name == "compute" else VARIANTS[name], world)
        machine = machines[name] = build(config, cpu)
        if name == "compute":
            machine.engine.wire = SilentWire(torch.float32)
        inputs = synthetic_input(config, cpu, seed=1)
        cycles[name] = lambda machine=machine, inputs=inputs: machine.step(inputs, 1e-3)  # type: ignore[misc]
    buffer = torch.zeros(machines["compute"].engine.layout.size)
    cycles["communication"] = lambda: dist.all_reduce(buffer)
    samples: dict[str, list[float]] = {name: [] for name in cycles}
    backward = []
    for number in range(1 + settings["repeats"]):
        for name, cycle in cycles.items():
            dist.barrier()
            if name != "communication" and VARIANTS.get(name, Variant()).shard:
                cycle()
            start = time.perf_counter()
            result = cycle()
            seconds = torch.tensor(time.perf_counter() - start, dtype=torch.float64)
            if name in machines:
                machines[name].engine.wait_pending()
            dist.all_reduce(seconds, op=dist.ReduceOp.MAX)
            if number:
                samples[name].append(1e3 * float(seconds))
                if name == "compute":
                    backward.append(
                        1e3 * result.compute_s * 2 / 3
                    )  # forward and backward, of which backward is two thirds
    link = measure_link(buffer.numel() * 4, torch.float32, cpu, all_reduce)
    if rank == 0:
        del machines["compute"]
        print(
            json.dumps(
                {
                    "samples": samples,
                    "predicted_ms": {},
                    "bound_ms": {},
                    "traces": {},
                    "buckets": {name: len(machine.engine.layout.buckets) for name, machine in machines.items()},
                    "backward_ms": statistics.median(backward),
                    "links": {"all_reduce": [1e3 * link.latency_s, link.bytes_per_s / 1e6]},
                }
            )
        )
    dist.barrier()
    dist.destroy_process_group()
