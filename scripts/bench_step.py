#!/usr/bin/env python3
"""What each choice of the step bought on this machine: one rank's training step with the choice on and off, interleaved.

    python scripts/bench_step.py --json results/step/mini.json

Batches are synthetic, each of new lengths, as in training. Every variant runs in a process of its own (an allocator setting
cannot be taken back), the variants in turn, several rounds; figures are medians over rounds.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from bert_fast.cli import load_config  # noqa: E402
from bert_fast.config import as_plain  # noqa: E402
from bert_fast.report.bench import add_arguments, environment, markdown_table, write_result  # noqa: E402

VARIANTS: dict[str, list[str]] = {
    "ours": [],
    "attention_sdpa_groups": ["model.attention_backend=grouped"],
    "attention_sdpa_loop": ["model.attention_backend=loop"],
    "every_batch_its_own_shape": ["batch.shape_multiple=1"],
    "system_allocator": ["--system-allocator"],
    "fp32": ["train.precision=fp32"],
}
ONE_RANK = ["system.world_size=1", "communication.engine=bucketed"]


def measure(config_file: str, settings: list[str], steps: int) -> dict[str, float]:
    """In this process: tokens/s of a training step (median over steps) and peak resident MiB."""
    import torch

    from bert_fast.train import build as building
    from bert_fast.train.environment import Environment, keep_freed_memory, pick_dtype
    from bert_fast.train.inputs import synthetic_batch, to_device
    from bert_fast.train.step import StepInput

    if "--system-allocator" not in settings:
        keep_freed_memory()
    settings = [s for s in settings if not s.startswith("--")]
    local = load_config(config_file).batch.local_batch
    config = load_config(config_file, [*ONE_RANK, f"batch.global_batch={local}", *settings])
    torch.set_num_threads(1)
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, [max(os.sched_getaffinity(0))])
    device = torch.device("cpu")
    machinery = building.build(config, Environment(0, 0, 1, device, pick_dtype(config.train.precision, device)))
    rates = []
    for number in range(steps):
        batch = synthetic_batch(local, config.data.max_seq_len, config.model.vocab_size, seed=number)
        inputs = StepInput([to_device(batch, device, config.batch.shape_multiple)], len(batch.masked_labels), local)
        start = time.perf_counter()
        machinery.step(inputs, lr=1e-4)
        rates.append(batch.num_tokens / (time.perf_counter() - start))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return {"tokens_per_s": statistics.median(rates), "peak_mib": peak}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="configs/mini_cpu.yaml", help="default %(default)s")
    parser.add_argument("--rounds", type=int, default=5, help="how often every variant runs (default %(default)s)")
    parser.add_argument("--steps", type=int, default=60, help="steps of one run of a variant (default %(default)s)")
    parser.add_argument("--child", metavar="VARIANT", help=argparse.SUPPRESS)
    add_arguments(parser)
    args = parser.parse_args()
    if args.child:
        print(json.dumps(measure(args.config, VARIANTS[args.child], args.steps)))
        return 0
    if args.quick:
        args.rounds, args.steps = 1, 10
    facts = environment()
    samples: dict[str, list[float]] = {}
    for _ in range(args.rounds):
        for name in VARIANTS:
            command = [sys.executable, __file__, "--config", args.config, "--steps", str(args.steps), "--child", name]
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode:
                print(f"error: variant {name} failed: {done.stderr.strip()[-300:]}", file=sys.stderr)
                return 3
            for figure, value in json.loads(done.stdout.splitlines()[-1]).items():
                samples.setdefault(f"mini/{name}/{figure}", []).append(value)
    metrics = {name: statistics.median(values) for name, values in samples.items()}
    rows = []
    for name in VARIANTS:
        pairs = zip(samples["mini/ours/tokens_per_s"], samples[f"mini/{name}/tokens_per_s"], strict=True)
        metrics[f"ratio/mini/ours_over_{name}"] = ratio = statistics.median(ours / other for ours, other in pairs)
        rate, peak = metrics[f"mini/{name}/tokens_per_s"], metrics[f"mini/{name}/peak_mib"]
        rows.append((name, f"{rate:,.0f}", f"{ratio:.2f}", f"{peak:,.0f}"))
    print(markdown_table(("variant", "tokens/s", "ours over it", "peak MiB"), rows))
    if args.json:
        setting = {
            "file": args.config,
            "rounds": args.rounds,
            "steps": args.steps,
            **as_plain(load_config(args.config)),
        }
        write_result(args.json, metrics, setting, facts, samples)
    return 0


if __name__ == "__main__":
    sys.exit(main())
