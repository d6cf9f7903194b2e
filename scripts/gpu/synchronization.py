"""Stage `synchronization`: the host never waits for the device in a step, for every engine, optimizer and format.

On a CPU, where nothing is asynchronous, the same steps run and nothing is counted.
"""

from __future__ import annotations

import itertools
from functools import partial
from typing import Any

import torch

from bert_fast.train.setup.build import build
from bert_fast.train.setup.warmup import synthetic_input

from .parts import config_of, environment_of, process_group
from .stage import CheckFailed, Context, NotAvailable

ENGINES: dict[str, dict[str, dict[str, Any]]] = {
    "bucketed": {"communication": {"engine": "bucketed", "clip": "bucket_before_reduce"}},
    "bucketed, clip after": {"communication": {"engine": "bucketed", "clip": "global_after_reduce"}},
    "bucketed, updates by bucket": {
        "communication": {"engine": "bucketed", "clip": "bucket_before_reduce"},
        "optimizer": {"step_per_bucket": True},
    },
    "bucketed, bf16 on the wire": {"communication": {"clip": "bucket_before_reduce", "reduce_dtype": "bf16"}},
    "sharded": {"communication": {"clip": "bucket_before_reduce", "shard_optimizer": True}},
    "ddp": {"communication": {"engine": "ddp", "clip": "bucket_before_reduce"}},
}


def run(context: Context) -> None:
    result = context.result
    formats = ("fp32",) if context.tiny else ("bf16", "fp16")  # fp16 has a loss scale
    quiet = total = 0
    with process_group(context):
        for (name, sections), optimizer, precision in itertools.product(ENGINES.items(), ("adamw", "lamb"), formats):
            label = f"{name}, {optimizer}, {precision}"
            total += 1
            if context.has_time(2, label):
                quiet += context.case(label, partial(_step, context, sections, optimizer, precision))
    result.metrics |= {"synchronization/quiet": quiet, "synchronization/total": total}
    if context.tiny:
        result.summary = f"{quiet} of {total} ran; a CPU does not wait"
    else:
        result.summary = f"no synchronization in {quiet} of {total}"
    if quiet == 0 and not result.failures:
        raise NotAvailable("no case was run")


def _step(context: Context, sections: dict[str, dict[str, Any]], optimizer: str, precision: str) -> None:
    changes = {name: dict(values) for name, values in sections.items()}
    changes["optimizer"] = {**changes.get("optimizer", {}), "name": optimizer}
    changes["communication"] = {**changes.get("communication", {}), "bucket_mb": 0.5}
    config = config_of(context, "mini", 8, precision, dropout={"p": 0.0}, **changes)
    environment = environment_of(config)
    components = build(config, environment)
    for seed in (1, 2):  # optimizer state, kernels, DDP's buckets
        components.step(synthetic_input(config, environment, seed), 1e-4)
    inputs = synthetic_input(config, environment, 3)
    if context.device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
    try:
        outcome = components.step(inputs, 1e-4)
    finally:
        if context.device == "cuda":
            torch.cuda.set_sync_debug_mode("default")
    components.engine.wait_pending()
    if not bool(outcome.is_finite):
        raise CheckFailed("the gradient is not finite")
