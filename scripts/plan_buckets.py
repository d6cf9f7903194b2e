#!/usr/bin/env python3
"""Plan gradient buckets for a backward and a link, and compare with the ways others choose them.

    python scripts/plan_buckets.py --trace runs/x/buckets.json                       # what a run with bucket_mb: auto measured
    python scripts/plan_buckets.py --model large --backward-ms 36 --link 0.2,80000   # ms of latency, MB/s; fp16 on the wire

Prints a table; `--out` writes a picture of the timelines and the plan as a fragment for a config.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import guard  # noqa: F401

import numpy as np

from bert_fast.cluster.backward_trace import SHAPES, model_trace
from bert_fast.command import guarded, not_negative, positive, whole
from bert_fast.communication.plan import (
    BucketPlan,
    Link,
    best_uniform,
    exact_plan,
    lower_bound,
    merge_rule,
    timeline,
    uniform_ends,
)
from bert_fast.config.yaml_files import to_yaml
from bert_fast.exit_codes import ExitCode
from bert_fast.files import write_atomically
from bert_fast.report.bench import add_arguments, environment, markdown_table, write_result
from bert_fast.run_folder import BUCKETS_CONFIG
from plots import svg_figure


def read_trace(path: str) -> tuple[np.ndarray, np.ndarray, list[str], Link | None]:
    record = json.loads(Path(path).read_text(encoding="utf-8"))
    units = record["units"]
    link = record.get("link")
    ready, sizes = (np.array([float(unit[key]) for unit in units]) for key in ("ready_s", "bytes"))
    if not len(ready) or not np.isfinite([*ready, *sizes]).all() or (sizes <= 0).any():
        raise ValueError("ready_s and bytes of every unit must be numbers, bytes positive")
    return ready, sizes, [str(unit["name"]) for unit in units], None if link is None else read_link(link)


def read_link(value: Any) -> Link:
    """From a JSON object, a file with one, or "ms,MB/s"."""
    if isinstance(value, str):
        if Path(value).is_file():
            value = json.loads(Path(value).read_text(encoding="utf-8"))
            value = value.get("link", value)
        else:
            milliseconds, megabytes = map(float, value.split(","))
            value = {"latency_s": milliseconds / 1e3, "bytes_per_s": megabytes * 1e6}
    link = Link(
        float(value["latency_s"]),
        float(value["bytes_per_s"]),
        tuple(value.get("sizes", ())),
        tuple(value.get("seconds", ())),
    )
    if not (link.latency_s >= 0 and link.bytes_per_s > 0):
        raise ValueError("a link needs a latency of at least 0 and a positive bandwidth")
    if len(link.sizes) != len(link.seconds) or any((np.diff(each) < 0).any() for each in (link.sizes, link.seconds)):
        raise ValueError("a link's table needs as many seconds as sizes, both rising")
    return link


def compare(ready: np.ndarray, sizes: np.ndarray, link: Link, least: float, most: float) -> dict[str, BucketPlan]:
    """Every strategy's timeline, ours first."""
    uniform, _ = best_uniform(ready, sizes, link)
    return {
        "auto": exact_plan(ready, sizes, link, min_bytes=least, max_bytes=most),
        "25mib": timeline(ready, sizes, uniform_ends(sizes, 25 * 2**20), link),
        "one_bucket": timeline(ready, sizes, [len(sizes)], link),
        "best_uniform": uniform,
        "mg_wfbp": merge_rule(ready, sizes, link),
    }


def draw(plans: dict[str, BucketPlan], ready: np.ndarray, path: Path) -> None:
    """One row per strategy: its buckets on the wire; the top row is backward."""
    with svg_figure(path, (9, 0.5 * len(plans) + 1.4)) as axes:
        axis = axes[0, 0]
        axis.barh(0, 1e3 * ready[-1], color="lightgrey", edgecolor="grey")
        axis.vlines(1e3 * ready, -0.4, 0.4, color="black", linewidth=0.4)
        for row, plan in enumerate(plans.values(), start=1):
            for number, (start, end) in enumerate(zip(plan.starts_s, plan.finish_s, strict=True)):
                axis.barh(row, 1e3 * (end - start), left=1e3 * start, color=("#0072b2", "#56b4e9")[number % 2])
        axis.axvline(1e3 * ready[-1], color="black", linestyle="--", linewidth=1)
        axis.set_yticks(range(len(plans) + 1), ["backward", *plans])
        axis.invert_yaxis()
        axis.set_xlabel("ms from the start of backward (ticks: a gradient is ready; dashed: backward ends)")


@guarded
def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--trace", metavar="FILE", help="units with ready_s and bytes, as buckets.json of a run")
    source.add_argument("--model", choices=SHAPES, help="a made-up timeline of BERT-base or BERT-large")
    parser.add_argument("--backward-ms", type=positive, default=36.0, help="with --model (default %(default)s)")
    parser.add_argument(
        "--wire-bytes", type=whole(1, 8), default=2, choices=(2, 4), help="an element, with --model (default 2)"
    )
    parser.add_argument("--tensors", action="store_true", help="with --model: tensors may part, not only clip groups")
    parser.add_argument("--link", metavar="FILE|MS,MB/S", help="latency and bandwidth; that of the trace if it has one")
    parser.add_argument("--min-mb", type=not_negative, default=0.0, help="MiB on the wire, of all buckets but the last")
    parser.add_argument("--max-mb", type=positive, default=4096.0, help="MiB on the wire, of buckets of several units")
    parser.add_argument("--out", metavar="FOLDER", help="write timeline.svg and buckets.yaml there")
    add_arguments(parser)
    args = parser.parse_args()
    try:
        link: Link | None = None
        if args.trace:
            ready, sizes, names, link = read_trace(args.trace)
        else:
            ready, sizes, names = model_trace(args.model, args.backward_ms / 1e3, args.wire_bytes, not args.tensors)
        link = read_link(args.link) if args.link else link
        if link is None:
            raise ValueError("no link; give --link MS,MB/S")
    except OSError as error:
        print(f"error: {error.filename}: {error.strerror}", file=sys.stderr)
        return ExitCode.USER_ERROR
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        print(f"error: --trace {args.trace or args.model}, --link {args.link}: {error}", file=sys.stderr)
        return ExitCode.USER_ERROR
    least, most = args.min_mb * 2**20, args.max_mb * 2**20
    times = []
    for _ in range(3 if args.quick else 20):
        start = time.perf_counter()
        try:
            exact_plan(ready, sizes, link, min_bytes=least, max_bytes=most)
        except ValueError as error:
            print(f"error: {error}; change --min-mb or --max-mb", file=sys.stderr)
            return ExitCode.USER_ERROR
        times.append(1e3 * (time.perf_counter() - start))
    plans = compare(ready, sizes, link, least, most)
    bound = lower_bound(ready, sizes, link)
    exact, others = plans["auto"].finish_s[-1], [plan.finish_s[-1] for name, plan in plans.items() if name != "auto"]
    metrics = {
        "plan_ms": float(np.median(times)),
        "exact_over_best_other": exact / min(others),
        "lower_bound_ms": 1e3 * bound,
    }
    metrics |= {f"finish_ms/{name}": 1e3 * plan.finish_s[-1] for name, plan in plans.items()}
    metrics |= {f"exposed_ms/{name}": 1e3 * plan.exposed_s for name, plan in plans.items()}
    rows = [
        (
            name,
            len(plan.ends),
            f"{1e3 * plan.finish_s[-1]:.3f}",
            f"{1e3 * plan.exposed_s:.3f}",
            f"{plan.finish_s[-1] / exact:.3f}",
        )
        for name, plan in plans.items()
    ]
    print(
        f"{len(sizes)} units, {sizes.sum() / 2**20:,.1f} MiB on the wire, backward {1e3 * ready[-1]:.2f} ms, link "
        f"{1e3 * link.latency_s:.3f} ms + {link.bytes_per_s / 1e6:,.0f} MB/s; planned in {metrics['plan_ms']:.2f} ms"
    )
    print(markdown_table(("buckets", "number", "finish ms", "exposed ms", "over auto"), rows))
    print(f"no plan exposes less than {1e3 * bound:.3f} ms")
    edges = [0, *plans["auto"].ends]
    element = 4 / args.wire_bytes if args.model else 1.0  # a trace's bytes are taken as those of the gradients
    caps = [float(sizes[a:b].sum()) * element / 2**20 for a, b in pairwise(edges)]
    if args.out:
        folder = Path(args.out)
        folder.mkdir(parents=True, exist_ok=True)
        draw(plans, ready, folder / "timeline.svg")
        write_atomically(folder / BUCKETS_CONFIG, to_yaml({"communication": {"bucket_mb": caps}}))
    if args.json:
        config = {**{k: v for k, v in vars(args).items() if k != "json"}, "units": names}
        write_result(args.json, metrics, config, environment(), {"plan_ms": times})
    return 0


if __name__ == "__main__":
    sys.exit(main())
