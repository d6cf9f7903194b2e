#!/usr/bin/env python3
"""What lossy wire formats send and cost the host, and what compressed preconditioners keep and cost.

    python -m scripts.benchmarks.compression --json results/compression/compression.json
    python -m scripts.benchmarks.compression --quick

Bytes: a step of BERT-base on the meta device, every collective answered at once, as the engine counts them, after the
exact steps of the formats that have some. Encoding: a bucket of 4 million numbers, encoded with its residual and decoded
as when it is received, both ways of an all-reduce, in turn with the cast to bf16 and back. Optimizers: steps of a BERT of
4 million parameters in turn with AdamW, fused as the project has it and as `torch.optim.AdamW(parameters)` is by itself,
once all windows are full; one thread.

Metrics: bytes_ratio/FORMAT (over fp32), encode_ms/FORMAT, encode_over_bf16/FORMAT, state_bytes_per_parameter/OPTIMIZER,
measured_bytes_per_parameter/OPTIMIZER, step_ms/OPTIMIZER, step_over_adamw/OPTIMIZER, step_over_torch_default/OPTIMIZER; and of
the runs in --runs, which scripts.benchmarks.compression.learning makes, samples_to_target/FORMAT/{mean,n}.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import scripts.guard  # noqa: F401

import torch
import torch.distributed as dist
from torch import nn

from bert_fast.cluster.backward_trace import SHAPES
from bert_fast.command import guarded, whole
from bert_fast.communication.buckets import GradientLayout, plan_layout
from bert_fast.communication.onebit import OneBit
from bert_fast.communication.reducer import BucketReducer
from bert_fast.communication.wire_format import WireFormat, wire_format
from bert_fast.config import ModelConfig, OptimizerConfig
from bert_fast.config.choices import OPTIMIZERS
from bert_fast.memory.state import num_parameters, optimizer_state
from bert_fast.model.bert import BertForPretraining, expected_ready_order
from bert_fast.optim.build import build_optimizer
from bert_fast.optim.preconditioned import Preconditioned
from bert_fast.report.bench import add_arguments, environment, markdown_table, write_result

from .learning import add_runs_argument, read_runs
from .learning import metrics_of as learning_metrics

FORMATS: dict[str, dict[str, Any]] = {
    "fp32": {}, "bf16": {}, "int8_ef": {}, "fp8_ef": {}, "topk_ef": {}, "powersgd": {"powersgd_rank": 4}, "onebit": {},
}  # fmt: skip
SMALL = ModelConfig(
    vocab_size=2048, hidden_size=256, num_layers=4, num_heads=4, intermediate_size=1024, max_positions=128
)
NUMBERS = 1 << 22
# What steps are measured of, beside AdamW
CONTESTANTS: dict[str, dict[str, Any]] = {
    "mfac_sparse": {"name": "mfac_sparse"},
    "mfac_lowrank": {"name": "mfac_lowrank", "window": 32},
    "ggt_sparse": {"name": "ggt_sparse"},
    "micro_adam": {"name": "micro_adam"},
}
_TARGET = 0.30


# ---- bytes ------------------------------------------------------------------------------------------------------------------


def bytes_ratio(name: str, settings: dict[str, Any], shape: ModelConfig) -> float:
    """Bytes that a rank counts in a step over those of its gradients in fp32."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", store=FakeStore(), rank=1, world_size=2)
    try:
        with torch.device("meta"):
            model = BertForPretraining(shape)
        parameters = list(model.parameters())
        wire = wire_format(name, torch.float32, **settings)
        if isinstance(wire, OneBit):
            moments = [torch.empty_like(p) for p in parameters]
            wire.attach(lambda index: (moments[index], moments[index]), 0.9)
        layout = layout_of(model, 2)
        engine = BucketReducer(model, layout, clip="bucket_before_reduce", max_norm=1.0, wire=wire)
        engine.zero_grad()
        with engine.micro_batch(last=True):
            pass  # parameters without a gradient count as zero
        engine.finish()
        return engine.counters()["gradient_bytes"] / (4 * sum(p.numel() for p in parameters))
    finally:
        dist.destroy_process_group()


def layout_of(model: BertForPretraining, shards: int) -> GradientLayout:
    """Buckets of 25 MiB, as a run has them."""
    named = list(model.named_parameters())
    return plan_layout(
        [name for name, _ in named], [p.numel() for _, p in named], expected_ready_order(model), clip_groups="layer",
        bucket_mb=25.0, whole_groups=True, shards=shards,
    )  # fmt: skip


# ---- encoding ---------------------------------------------------------------------------------------------------------------


def coders(numbers: int) -> dict[str, Callable[[], None]]:
    """Of every format what a rank computes for a bucket before and after it is sent; the bucket is one square matrix."""
    side = int(numbers**0.5)
    parameter = nn.Parameter(torch.zeros(side, side))
    values = torch.randn(side * side) * 1e-3
    found = {}
    for name, settings in FORMATS.items():
        if name == "fp32":
            continue
        layout = plan_layout(
            ["layers.0.weight"], [side * side], [0], clip_groups="layer", bucket_mb=1e6, whole_groups=True
        )
        wire = wire_format(name, torch.float32, **settings)
        wire.begin(layout, [parameter], 1)
        if isinstance(wire, OneBit):
            first, second = torch.randn(side, side), torch.rand(side, side)
            wire.attach(lambda _, first=first, second=second: (first, second), 0.9)  # type: ignore[misc]
        found[name] = _coder(wire, values)
    return found


def _coder(wire: WireFormat, values: torch.Tensor) -> Callable[[], None]:
    def run() -> None:
        mine = values.clone()
        message = wire.encode(0, mine)
        if wire.is_cast:
            wire.decode(message, mine)
        else:  # one rank's collectives leave what it sent
            for work in wire.all_reduce(0, message, mine, None):
                work.wait()
        wire.end_step(False)

    return run


# ---- optimizers -------------------------------------------------------------------------------------------------------------


def optimizers() -> tuple[dict[str, torch.optim.Optimizer], list[nn.Parameter]]:
    """AdamW, torch's default AdamW, and the contestants over the same weights and gradients."""
    model = BertForPretraining(SMALL)
    parameters = list(model.parameters())
    for parameter in parameters:
        parameter.grad = torch.randn_like(parameter) * 1e-3
    made: dict[str, torch.optim.Optimizer] = {
        "adamw": build_optimizer(model.named_parameters(), OptimizerConfig(name="adamw", lr=1e-9)),
        "torch_default": torch.optim.AdamW(parameters, lr=1e-9),
    }
    for name, settings in CONTESTANTS.items():
        made[name] = build_optimizer(model.named_parameters(), OptimizerConfig(**settings, lr=1e-9))
    return made, parameters


def fill_windows(made: dict[str, torch.optim.Optimizer], parameters: list[nn.Parameter]) -> None:
    """As many steps as the longest window has rows."""
    rows = max(choice.window.rows for choice in OPTIMIZERS.values() if choice.window is not None)
    for _ in range(rows + 1):
        for parameter in parameters:
            assert parameter.grad is not None
            parameter.grad.normal_(std=1e-3)
        for optimizer in made.values():
            if isinstance(optimizer, Preconditioned):
                optimizer.step()


# ---- all --------------------------------------------------------------------------------------------------------------------


def in_turn(tasks: dict[str, Callable[[], Any]], repeats: int) -> dict[str, list[float]]:
    """Milliseconds of each task, in rounds in which they take turns; the first round does not count."""
    taken: dict[str, list[float]] = {name: [] for name in tasks}
    for number in range(1 + repeats):
        for name in list(tasks) if number % 2 else reversed(list(tasks)):
            start = time.perf_counter()
            tasks[name]()
            if number:
                taken[name].append(1e3 * (time.perf_counter() - start))
    return taken


def ratio(taken: dict[str, list[float]], name: str, baseline: str) -> float:
    """The median of the rounds' ratios."""
    return statistics.median(a / b for a, b in zip(taken[name], taken[baseline], strict=True))


@guarded
def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=whole(1, 10**6), default=15, help="measured rounds (default %(default)s)")
    add_runs_argument(parser)
    add_arguments(parser)
    args = parser.parse_args()
    if args.quick:
        args.repeats = 3
    machine = environment()
    torch.manual_seed(0)
    torch.set_num_threads(1)
    metrics: dict[str, float] = {}
    for name, settings in FORMATS.items():
        metrics[f"bytes_ratio/{name}"] = bytes_ratio(name, settings, SHAPES["base"])
    dist.init_process_group("gloo", store=torch._C._distributed_c10d.HashStore(), rank=0, world_size=1)
    coded = in_turn(coders(NUMBERS), args.repeats)
    dist.destroy_process_group()
    for name, taken in coded.items():
        metrics[f"encode_ms/{name}"] = statistics.median(taken)
        metrics[f"encode_over_bf16/{name}"] = ratio(coded, name, "bf16")
    made, parameters = optimizers()
    fill_windows(made, parameters)
    stepped = in_turn({name: each.step for name, each in made.items()}, args.repeats)
    count = sum(p.numel() for p in parameters)
    for name, taken in stepped.items():
        metrics[f"step_ms/{name}"] = statistics.median(taken)
        metrics[f"step_over_adamw/{name}"] = ratio(stepped, name, "adamw")
        metrics[f"step_over_torch_default/{name}"] = ratio(stepped, name, "torch_default")
    for name in ("adamw", *CONTESTANTS, "mfac", "ggt"):
        state = optimizer_state(SHAPES["base"], OptimizerConfig(**CONTESTANTS.get(name, {"name": name})))
        assert state is not None
        metrics[f"state_bytes_per_parameter/{name}"] = sum(state.values()) / num_parameters(SHAPES["base"])
        if isinstance(made.get(name), Preconditioned):
            metrics[f"measured_bytes_per_parameter/{name}"] = made[name].state_bytes() / count  # type: ignore[attr-defined]
    runs = read_runs(args.runs)
    metrics |= {key: value for key, value in learning_metrics(runs, _TARGET).items() if key.startswith("samples_to_")}
    _print(metrics)
    if args.json:
        config = {
            "formats": FORMATS,
            "optimizers": CONTESTANTS,
            "repeats": args.repeats,
            "threads": 1,
            "parameters": count,
        }
        write_result(args.json, metrics, config, machine, {"encode": coded, "steps": stepped})
    return 0


def _print(metrics: dict[str, float]) -> None:
    def cell(name: str, form: str = ".2f") -> str:
        return format(metrics[name], form) if name in metrics else "-"

    rows = [
        (name, cell(f"bytes_ratio/{name}", ".4f"), cell(f"encode_ms/{name}", ".1f"), cell(f"encode_over_bf16/{name}"))
        for name in FORMATS
    ]
    print(markdown_table(("format", "bytes / fp32", "ms to encode and decode", "over bf16"), rows) + "\n")
    contestants = ("adamw", "torch_default", *CONTESTANTS, "mfac", "ggt")
    steps = [
        (
            name,
            cell(f"state_bytes_per_parameter/{name}"),
            cell(f"measured_bytes_per_parameter/{name}"),
            cell(f"step_ms/{name}", ".1f"),
            cell(f"step_over_adamw/{name}"),
            cell(f"step_over_torch_default/{name}"),
        )
        for name in contestants
    ]
    headers = (
        "optimizer",
        "bytes a parameter (base)",
        "measured (small)",
        "step ms",
        "over AdamW",
        "over torch's default",
    )
    print(markdown_table(headers, steps))


if __name__ == "__main__":
    sys.exit(main())
