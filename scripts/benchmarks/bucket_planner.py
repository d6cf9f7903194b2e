#!/usr/bin/env python3
"""The exact bucket planner against other rules on many random timelines, and how long it takes for BERT-large.

    python -m scripts.benchmarks.bucket_planner --json results/overlap/planner.json

Metrics: RULE_over_exact/{mean,p99,max,wins} (time until all gradients are reduced; wins: share of timelines on which the exact
plan is better by more than 0.1 %), plan_ms for BERT-large's tensors.
"""

from __future__ import annotations

import argparse
import sys
import time

import scripts.guard  # noqa: F401

import numpy as np

from bert_fast.command import guarded, whole
from bert_fast.communication.plan import (
    Link,
    best_uniform,
    exact_plan,
    merge_rule,
    timeline,
    uniform_ends,
)
from bert_fast.report.bench import add_arguments, environment, markdown_table, write_result


def random_timeline(seed: int, most: int = 60) -> tuple[np.ndarray, np.ndarray, Link]:
    """Ready times [n], sizes [n] and a link of very different regimes; n from 1 to `most`."""
    rng = np.random.default_rng(seed)
    count = int(rng.integers(1, most + 1))
    ready = np.cumsum(rng.exponential(1.0, count)) * 1e-3
    sizes = np.exp(rng.normal(0, rng.uniform(0.1, 2.5), count)) * 1e6
    link = Link(float(10 ** rng.uniform(-6, -2)), float(sizes.sum() / ready[-1] * 10 ** rng.uniform(-1, 1.5)))
    return ready, sizes, link


def plan_times(repeats: int) -> list[float]:
    """Milliseconds to plan 392 tensors of BERT-large's sizes, evenly ready over 9 ms."""
    width = 1024
    layer = (
        [width * width, width] * 4
        + [width] * 2
        + [4 * width * width, 4 * width, 4 * width * width, width, width, width]
    )
    sizes = np.array([30522, width, width, *layer * 24, 2 * width, 512 * width, 30522 * width, width, width], float) * 2
    ready = np.linspace(9e-3 / len(sizes), 9e-3, len(sizes))
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        exact_plan(ready, sizes, Link(2e-4, 8e10))
        times.append(1e3 * (time.perf_counter() - start))
    return times


@guarded
def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--timelines", type=whole(1, 10**9), default=2000, help="default %(default)s")
    add_arguments(parser)
    args = parser.parse_args()
    count = 200 if args.quick else args.timelines
    ratios: dict[str, list[float]] = {"mg_wfbp": [], "best_uniform": [], "25mib": [], "one_bucket": []}
    for seed in range(count):
        ready, sizes, link = random_timeline(seed)
        exact = exact_plan(ready, sizes, link).finish_s[-1]
        others = {
            "mg_wfbp": merge_rule(ready, sizes, link),
            "best_uniform": best_uniform(ready, sizes, link)[0],
            "25mib": timeline(ready, sizes, uniform_ends(sizes, 25 * 2**20), link),
            "one_bucket": timeline(ready, sizes, [len(sizes)], link),
        }
        for name, plan in others.items():
            ratios[name].append(plan.finish_s[-1] / exact)
    metrics: dict[str, float] = {}
    rows = []
    for name, values in ratios.items():
        over_exact = np.array(values)
        row = {
            "mean": over_exact.mean(),
            "p50": np.median(over_exact),
            "p99": np.quantile(over_exact, 0.99),
            "max": over_exact.max(),
        }
        metrics |= {f"{name}_over_exact/{key}": float(value) for key, value in row.items()}
        metrics[f"{name}_over_exact/min"] = float(over_exact.min())
        metrics[f"{name}_over_exact/wins"] = float((over_exact > 1.001).mean())
        rows.append((name, *(f"{value:.3f}" for value in row.values()), f"{100 * (over_exact > 1.001).mean():.0f} %"))
    times = plan_times(3 if args.quick else 50)
    metrics["plan_ms"] = float(np.median(times))
    print(markdown_table(("rule over exact", "mean", "median", "p99", "max", "exact is better"), rows))
    print(f"{count:,} timelines; 392 tensors of BERT-large planned in {metrics['plan_ms']:.2f} ms")
    if args.json:
        write_result(args.json, metrics, {"timelines": count}, environment(), {**ratios, "plan_ms": times})
    return 0


if __name__ == "__main__":
    sys.exit(main())
