#!/usr/bin/env python3
"""What plans of rematerialization save and cost, and how near predicted memory is to what is measured.

    python -m scripts.benchmarks.memory --json results/memory/memory.json

1. Peaks: each way to recompute in a process of its own, in fp32 and bf16, with and without dropout: the growth of its resident
   memory from before the model is built, over some steps, against the estimate from shapes.
2. Times: the same steps in one process, the ways in turn; medians over the median of keeping everything.
3. BERT-large and a model of twice the layers at 56 x 512 tokens in bf16: activations of the least peak over those of a layer at
   a time, on fake tensors by torch's MemTracker; and the chain from shapes of a GPU against it, with norms as a GPU has them.
4. The planner on 100,000 stages.
5. The largest micro-batch that is said to fit some GiB is run, and one that is 10 % larger.

Metrics: peak_mib/SETTING, predicted_mib/SETTING, prediction_error_max, time_ratio/SETTING,
budget_overhead_over_layer, activation_ratio_optimal_over_layer/{large,large48}, memtracker_error_max,
gpu_by_shape_error_max (relative to MemTracker's bytes), planner_100k_s,
largest_micro_batch/GIB/{size,peak_gib,larger_peak_gib}.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import subprocess
import sys
import time
from typing import Any

import scripts.guard  # noqa: F401

import torch

from bert_fast.command import guarded, whole
from bert_fast.config import Config
from bert_fast.config.load import config_from_tree
from bert_fast.errors import UserError
from bert_fast.exit_codes import ExitCode
from bert_fast.memory.budget import largest_micro_batch, with_changes
from bert_fast.memory.estimate import chain_of, estimate
from bert_fast.memory.recomputation import make_recomputation_plan
from bert_fast.memory.remat import Chain, Stage, keep_all, least_peak
from bert_fast.memory.stages import longest_micro_batch
from bert_fast.report.bench import add_arguments, environment, markdown_table, write_result
from bert_fast.train.setup.memory_fit import likely_hardware
from scripts.programs import ROOT

from .large import activation_ratios
from .times import step_times

_GIB, _MIB = 2**30, 2**20
SHAPE = {
    "vocab_size": 8192, "hidden_size": 512, "num_layers": 8, "num_heads": 8, "intermediate_size": 2048, "max_positions": 512,
}  # fmt: skip
WAYS = ("none", "attention", "layer", "half_layer", "optimal", "budget")
_SAMPLES, _LENGTH = 32, 256
# A model whose activations are most of its memory, so that a micro-batch of many GiB takes a minute
_WIDE = {
    "vocab_size": 1024, "hidden_size": 256, "num_layers": 2, "num_heads": 4, "intermediate_size": 1024, "max_positions": 512,
}  # fmt: skip


def make_config(
    how: str,
    precision: str,
    shape: dict[str, Any] = SHAPE,
    samples: int = _SAMPLES,
    length: int = _LENGTH,
    **memory: Any,
) -> Config:
    """A config of one rank on the CPU whose batches are given by hand."""
    return config_from_tree(
        {
            "run": {"tensorboard": False, "measure_peak_flops": False},
            "model": {**shape},
            "data": {"train": "unused", "max_seq_len": length},
            "batch": {"global_batch_size": samples, "micro_batch_size": samples},
            "memory": {"recompute": how, **memory},
            "optimizer": {"lr": 1e-4},
            "schedule": {"warmup_steps": 0, "total_steps": 1000},
            "train": {"precision": precision, "max_steps": 10, "warmup_batches": 0},
            "evaluation": {"data": "unused", "every_samples": 1000},
            "system": {"world_size": 1, "device": "cpu", "threads_per_rank": 1, "bind_cores": False},
        }
    )


def predicted_bytes(config: Config) -> int:
    """What `--dry-run` says of the longest micro-batch."""
    chain = chain_of(config, longest_micro_batch(config), likely_hardware(config, "cpu"))
    return estimate(config, chain, make_recomputation_plan(config, chain), on_cpu=True).total


def midway(config: Config) -> float:
    """GiB in the middle between the least peak and keeping everything."""
    chain = chain_of(config, longest_micro_batch(config), likely_hardware(config, "cpu"))
    ends = [estimate(config, chain, plan, on_cpu=True).total for plan in (least_peak(chain), keep_all(chain))]
    return sum(ends) / 2 / _GIB


def run(config: Config, lengths: list[int], steps: int, threads: int = 1) -> dict[str, Any]:
    """A process of its own (worker.py). Raises UserError where it fails."""
    task = {"config": config.model_dump(mode="json"), "lengths": lengths, "steps": steps, "threads": threads}
    done = subprocess.run(
        [sys.executable, "-m", "scripts.benchmarks.memory.worker"], input=json.dumps(task), capture_output=True, text=True,
        check=False, cwd=ROOT,
    )  # fmt: skip
    if done.returncode:
        lines = done.stderr.strip().splitlines() or [f"it ended with code {done.returncode}"]
        raise UserError(f"memory.recompute={config.memory.recompute}: {lines[-1]}")
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def peaks(quick: bool) -> tuple[dict[str, float], list[dict[str, Any]]]:
    """Every setting's peak and prediction."""
    metrics, rows, errors = {}, [], []
    for precision in ("fp32", "bf16"):
        for how in WAYS:
            memory: dict[str, Any] = {"budget_gib": midway(make_config("none", precision))} if how == "budget" else {}
            config = make_config(how, precision, **memory)
            found = run(config, [_LENGTH] * _SAMPLES, 1 if quick else 2)
            setting, predicted = f"{how}-{precision}", predicted_bytes(config)
            error = predicted / found["peak_bytes"] - 1
            errors.append(abs(error))
            metrics[f"peak_mib/{setting}"] = found["peak_bytes"] / _MIB
            metrics[f"predicted_mib/{setting}"] = predicted / _MIB
            rows.append({"setting": setting, "error": error, **found})
            print(f"{setting}: {found['peak_bytes'] / _MIB:,.0f} MiB, predicted {100 * error:+.1f} %", flush=True)
            if quick:
                break
    metrics["prediction_error_max"] = max(errors)
    return metrics, rows


def largest(gibs: list[int], precision: str) -> tuple[dict[str, float], list[dict[str, Any]]]:
    """The largest micro-batch for a budget, run, and 10 % more."""
    metrics, rows = {}, []
    for gib in gibs:
        config = make_config("none", precision, _WIDE, 1, 512)
        size = largest_micro_batch(config, gib, likely_hardware(config, "cpu"))
        for name, samples in (("peak_gib", size), ("larger_peak_gib", size + -(-size // 10))):
            changed = with_changes(config, {"batch.micro_batch_size": samples, "batch.global_batch_size": samples})
            found = run(changed, [512] * samples, 2, threads=2)
            metrics[f"largest_micro_batch/{gib}/{name}"] = found["peak_bytes"] / _GIB
            rows.append({"gib": gib, "samples": samples, **found})
        metrics[f"largest_micro_batch/{gib}/size"] = float(size)
        print(gib, {name: value for name, value in metrics.items() if f"/{gib}/" in name}, flush=True)
    return metrics, rows


def planner_seconds(stages: int) -> float:
    """Least peak of a chain whose stages differ."""
    rng = random.Random(0)
    chain = Chain(
        tuple(Stage("", rng.randint(1, 100), rng.randint(0, 500), 1.0, rng.randint(0, 200)) for _ in range(stages))
    )
    start = time.perf_counter()
    least_peak(chain)
    return time.perf_counter() - start


@guarded
def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser)
    parser.add_argument("--repeats", type=whole(1, 10_000), default=7, help="steps of each way, in turn (default 7)")
    parser.add_argument(
        "--gib", type=whole(1, 4096), nargs="*", default=[4, 8, 16], help="budgets for the largest micro-batch"
    )
    parser.add_argument("--only", choices=["peaks", "times", "large", "planner", "largest"], help="one part of it")
    args = parser.parse_args()
    metrics: dict[str, Any] = {}
    samples: dict[str, Any] = {}

    def wanted(part: str) -> bool:
        return args.only in (None, part)

    if wanted("planner"):
        times = [planner_seconds(100_000) for _ in range(1 if args.quick else 5)]
        metrics["planner_100k_s"], samples["planner_100k_s"] = statistics.median(times), times
    if wanted("large"):
        found, samples["large"] = activation_ratios(quick=args.quick)
        metrics |= found
    if wanted("peaks"):
        found, samples["peaks"] = peaks(args.quick)
        metrics |= found
    if wanted("times"):
        budget = midway(make_config("none", "bf16"))
        given: dict[str, dict[str, Any]] = {"budget": {"budget_gib": budget}}
        configs = {how: make_config(how, "bf16", **given.get(how, {})) for how in WAYS}
        found, samples["times"] = step_times(configs, [_LENGTH] * _SAMPLES, 1 if args.quick else args.repeats)
        metrics |= found
    if wanted("largest") and not args.quick:
        found, samples["largest"] = largest(args.gib, "bf16")
        metrics |= found
    print(markdown_table(["metric", "value"], [[name, f"{value:.4g}"] for name, value in metrics.items()]))
    if args.json:
        described = {"shape": SHAPE, "samples": _SAMPLES, "length": _LENGTH, "wide": _WIDE, "torch": torch.__version__}
        write_result(args.json, metrics, described, environment(), samples)
    return ExitCode.OK


if __name__ == "__main__":
    sys.exit(main())
