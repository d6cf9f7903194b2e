#!/usr/bin/env python3
"""Every balancing strategy over ranks and micro-batch sizes: imbalance, planning time, traffic, randomness; planner start-up.

    python -m scripts.benchmarks.balance.imbalance --json results/balance/balance.json --out results/balance

Costs are FLOPs of BERT-large, unpadded. One thread. `--out` writes the table (README-ready Markdown) and a plot.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import argparse
import json
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import scripts.guard  # noqa: F401

import numpy as np

from bert_fast.balance import assign
from bert_fast.balance.cost import CostModel
from bert_fast.balance.lengths import wikipedia_like
from bert_fast.balance.planner import Plan, Planner
from bert_fast.command import guarded, share, whole
from bert_fast.config import BalanceConfig
from bert_fast.config.choices import STRATEGIES
from bert_fast.errors import UserError
from bert_fast.exit_codes import ExitCode
from bert_fast.files import write_atomically
from bert_fast.report.bench import add_arguments, environment, markdown_table, write_result

from ...plots import svg_figure
from ..common import peak_resident_mib, pin_to_one_core

RANKS, BATCHES = (8, 64, 256, 1024, 4096), (2, 4, 8, 16, 48)
BERT_LARGE = CostModel(3 * 613.7e6, 3 * 98_304)  # training FLOPs per token and per squared token
NODE_SIZE = 8
NUM_BINS = 16
TRAFFIC_STEPS = 20
NUM_SAMPLES_AT_START = 160_000_000
# strategy, ranks, micro-batch size: most imbalance (p99), most planning time (ms)
BARS = (
    ("balanced", 1024, 16, 1.001, 5.0),
    ("balanced", 1024, 8, 1.005, None),
    ("balanced", 4096, 16, 1.001, 25.0),
    ("balanced_free", 1024, 4, 1.02, None),
    ("balanced_free", 1024, 2, 1.04, None),
)


@dataclass
class Case:
    """One strategy at one size."""

    strategy: str
    ranks: int
    batch: int

    @property
    def name(self) -> str:
        return f"{self.strategy}/{self.ranks}x{self.batch}"


def make_planner(lengths: np.ndarray, case: Case) -> Planner:
    longest = int(lengths.max())
    return Planner(
        lengths,
        BalanceConfig(strategy=case.strategy),
        BERT_LARGE,
        world_size=case.ranks,
        gradient_accumulation_steps=1,
        micro_batch_size=case.batch,
        node_size=min(NODE_SIZE, case.ranks),
        max_seq_len=longest,
        seed=0,
        longest=longest,
    )


def measure(lengths: np.ndarray, case: Case, steps: int) -> tuple[dict[str, float], dict[str, list[float]]]:
    """Metrics of a case, and the raw imbalance and planning time of every step."""
    planner = make_planner(lengths, case)
    edges = np.quantile(lengths[: 2**20], np.linspace(0, 1, NUM_BINS + 1)[1:-1])
    bin_of = np.searchsorted(np.unique(edges), np.arange(int(lengths.max()) + 1))
    histogram = np.zeros((steps, int(bin_of.max()) + 1))
    rank_sums, rank_counts = np.zeros(case.ranks), np.zeros(case.ranks)
    means, imbalances, over_ideal, floors, times, traffic = [], [], [], [], [], []
    for step in range(steps):
        start = time.perf_counter()
        plan = planner.plan(step)
        times.append(1e3 * (time.perf_counter() - start))
        long = planner.lengths_of(plan)
        imbalances.append(plan.imbalance)
        over_ideal.append(plan.costs.max() * case.ranks / plan.useful)
        floors.append(planner.bound(plan))
        histogram[step] = np.bincount(bin_of[long], minlength=histogram.shape[1])
        means.append(long.mean())
        rank_sums += np.diff(np.concatenate([[0], np.cumsum(long)])[plan.starts])
        rank_counts += plan.counts()
        if step < TRAFFIC_STEPS:
            traffic.append(bytes_moved(plan, planner.draw(step), long))
    spread, mean = float(lengths.std(dtype=np.float64)), float(lengths.mean(dtype=np.float64))
    metrics = {
        "imbalance_mean": np.mean(imbalances),
        "imbalance_p99": np.quantile(imbalances, 0.99),
        "over_ideal_mean": np.mean(over_ideal),
        "lower_bound_p99": np.quantile(floors, 0.99),
        "plan_ms": np.median(times),
        "plan_ms_p99": np.quantile(times, 0.99),
        "bytes_moved_per_rank": np.mean(traffic),
        "mutual_information_bits": mutual_information(histogram),
        "batch_mean_variance_ratio": np.var(means, ddof=1) / (spread**2 / (case.ranks * case.batch)),
        "rank_bias_standard_errors": np.max(np.abs(rank_sums / rank_counts - mean) * np.sqrt(rank_counts) / spread),
    }
    raw = {"imbalance": [round(x, 6) for x in imbalances], "plan_ms": [round(x, 3) for x in times]}
    return {name: float(value) for name, value in metrics.items()}, raw


def mutual_information(histogram: np.ndarray) -> float:
    """I(length bin; batch) in bits from counts [batches, bins], less its bias (Miller and Madow)."""
    total = histogram.sum()
    joint = histogram / total
    outer = joint.sum(axis=1, keepdims=True) * joint.sum(axis=0, keepdims=True)
    occurs = joint > 0
    information = float((joint[occurs] * np.log2(joint[occurs] / outer[occurs])).sum())
    bins = int((histogram.sum(axis=0) > 0).sum())
    return information - (bins - 1) * (len(histogram) - 1) / (2 * total * np.log(2))


def bytes_moved(plan: Plan, drawn: np.ndarray, lengths: np.ndarray) -> float:
    """Bytes that each rank would receive in a step, on average, if every rank held the samples drawn for it, in order.

    With the shared store of this project nothing is sent: every rank reads its own samples.
    """
    owner_of = np.argsort(drawn, kind="stable") // (len(drawn) // len(plan.counts()))
    owner = owner_of[np.searchsorted(np.sort(drawn), plan.ids)]
    rank = np.repeat(np.arange(len(plan.counts())), plan.counts())
    record = 2 * (3 + 2 * np.rint(0.15 * lengths) + lengths)
    return float(record[owner != rank].sum() / len(plan.counts()))


def measure_budget(budget_ms: float = 20.0, steps: int = 20) -> float:
    """Median milliseconds of a core that refinement takes, for 1,024 x 16, four of five samples at the maximum.

    Such lengths are hard to balance: most steps spend all of the budget.
    """
    lengths, taken = lengths_with_spike(steps * 16_384, 0.8), []
    table = BERT_LARGE.table(512)[0]
    for step in range(steps):
        costs = table[lengths[step * 16_384 :][:16_384]]
        grid = assign.karmarkar_karp(costs, 1024)
        start = time.process_time()
        assign.refine(costs, grid, budget_ms)
        taken.append(1e3 * (time.process_time() - start))
    return float(np.median(taken))


def lengths_with_spike(count: int, share: float, longest: int = 512, seed: int = 0) -> np.ndarray:
    """Lengths of which `share` are at the maximum and the others uniform, uint16."""
    rng = np.random.default_rng(seed)
    lengths = rng.integers(5, longest + 1, count)
    lengths[rng.random(count) < share] = longest
    return lengths.astype(np.uint16)


def measure_start(count: int) -> dict[str, dict[str, float]]:
    """Seconds to a first plan and resident MiB for a table of `count` samples, each strategy in its own process."""
    starts = {}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "lengths.npy"
        table = np.lib.format.open_memmap(path, "w+", np.uint16, (count,))
        wikipedia_like(count, seed=1, out=table)
        table.flush()
        del table
        for strategy in STRATEGIES:
            command = [
                sys.executable,
                "-m",
                "scripts.benchmarks.balance.imbalance",
                "--start-child",
                strategy,
                str(path),
            ]
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            starts[strategy] = json.loads(done.stdout)
    return starts


def start_child(strategy: str, path: str) -> None:
    """In a fresh process: open the table, plan step 0 and a late step of 1,024 x 16 as after a resume."""
    start = time.perf_counter()
    lengths = np.load(path, mmap_mode="r")
    planner = Planner(
        lengths,
        BalanceConfig(strategy=strategy),
        BERT_LARGE,
        world_size=1024,
        gradient_accumulation_steps=1,
        micro_batch_size=16,
        node_size=NODE_SIZE,
        max_seq_len=512,
        seed=0,
    )
    planner.plan(0)
    first = time.perf_counter() - start
    planner.plan(9_000)
    print(json.dumps({"startup_s": first, "rss_mib": peak_resident_mib()}))


def draw(metrics: dict[str, float], ranks: tuple[int, ...], batches: tuple[int, ...], path: Path) -> None:
    """Mean imbalance against ranks, one panel per micro-batch size."""
    with svg_figure(path, (4.2 * len(batches), 3.8), columns=len(batches), sharey=True) as axes:
        styles = ("-", "--", "-.", ":")
        for axis, batch in zip(axes[0], batches, strict=True):
            for number, strategy in enumerate(STRATEGIES):
                values = [metrics[f"{strategy}/{r}x{batch}/over_ideal_mean"] for r in ranks]
                axis.loglog(ranks, np.array(values) - 1, styles[number % 4], marker="o", markersize=3, label=strategy)
            axis.set_title(f"micro-batch size {batch}")
            axis.set_xlabel("ranks")
            axis.set_xticks(ranks, [f"{r:,}" for r in ranks])
            axis.minorticks_off()
            axis.grid(alpha=0.3)
        axes[0][0].set_ylabel("slowest rank over even, unpadded work, less 1")
        axes[0][-1].legend(fontsize=8, loc="center left", bbox_to_anchor=(1.02, 0.5))


def tables(metrics: dict[str, float], ranks: tuple[int, ...], batches: tuple[int, ...]) -> str:
    """The Markdown record."""
    columns = (
        ("imbalance_mean", "imbalance mean", ".4f"),
        ("imbalance_p99", "p99", ".4f"),
        ("over_ideal_mean", "over ideal", ".4f"),
        ("lower_bound_p99", "bound p99", ".4f"),
        ("plan_ms", "plan ms", ".2f"),
        ("bytes_moved_per_rank", "bytes moved", ",.0f"),
        ("mutual_information_bits", "I bits", ".4f"),
        ("batch_mean_variance_ratio", "batch var.", ".2f"),
        ("rank_bias_standard_errors", "rank bias", ".1f"),
    )
    parts = []
    for rank in ranks:
        rows = [
            (strategy, batch, *(format(metrics[f"{strategy}/{rank}x{batch}/{key}"], form) for key, _, form in columns))
            for batch in batches
            for strategy in STRATEGIES
        ]
        table = markdown_table(("strategy", "batch", *(title for _, title, _ in columns)), rows)
        parts.append(f"## {rank:,} ranks\n\n{table}\n")
    return "\n".join(parts)


def bars(metrics: dict[str, float]) -> str:
    rows = []
    for strategy, ranks, batch, most, most_ms in BARS:
        name = f"{strategy}/{ranks}x{batch}"
        if f"{name}/imbalance_p99" not in metrics:
            continue
        p99, milliseconds = metrics[f"{name}/imbalance_p99"], metrics[f"{name}/plan_ms"]
        bound = metrics[f"{name}/lower_bound_p99"]
        met = p99 <= most and (most_ms is None or milliseconds <= most_ms)
        word = "met" if met else f"missed; no plan can be below {bound:.4f}" if bound > most else "missed"
        limit = "" if most_ms is None else f"{most_ms:g}"
        rows.append((name, f"{p99:.4f}", most, f"{milliseconds:.2f}", limit, word))
    return markdown_table(("bar", "p99", "at most", "plan ms", "at most", "verdict"), rows) if rows else ""


@guarded
def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=whole(1, 10**6), nargs="+", default=RANKS, help="default %(default)s")
    parser.add_argument(
        "--batches", type=whole(1, 10**6), nargs="+", default=BATCHES, help="micro-batch sizes, default %(default)s"
    )
    parser.add_argument(
        "--steps", type=whole(2, 10**6), default=200, help="global batches planned (default %(default)s)"
    )
    parser.add_argument(
        "--share-at-maximum", type=share, metavar="S", help="lengths uniform up to 512, but this share of them 512"
    )
    parser.add_argument(
        "--budget", action="store_true", help="only measure what refining with a budget of 20 ms takes here"
    )
    parser.add_argument("--lengths", metavar="FILE.npy", help="uint16 lengths, e.g. of a store; else Wikipedia-like")
    parser.add_argument("--out", metavar="FOLDER", help="write balance.md and imbalance.svg there")
    parser.add_argument("--no-start", action="store_true", help="skip the start-up with 160 million samples")
    parser.add_argument("--start-child", nargs=2, help=argparse.SUPPRESS)
    add_arguments(parser)
    args = parser.parse_args()
    if args.start_child:
        start_child(*args.start_child)
        return 0
    if args.quick:
        args.ranks, args.batches, args.steps = (8, 1024), (4, 16), 20
    ranks, batches = tuple(args.ranks), tuple(args.batches)
    pin_to_one_core()
    if args.budget:
        print(f"refining with a budget of 20 ms takes {measure_budget():.1f} ms of this core")
        return 0
    machine = environment()
    try:
        if args.share_at_maximum is not None and not args.lengths:
            lengths = lengths_with_spike(4_000_000, args.share_at_maximum)
        else:
            lengths = np.load(args.lengths, mmap_mode="r") if args.lengths else wikipedia_like(16_279_552)
        if lengths.ndim != 1 or lengths.dtype.kind not in "iu" or not len(lengths) or not 0 < lengths.max() < 2**16:
            raise ValueError("not a list of lengths between 1 and 65535")
        lengths = lengths.astype(np.uint16)
    except (OSError, ValueError) as error:
        print(f"error: --lengths {args.lengths}: {error}; give a .npy file of whole numbers", file=sys.stderr)
        return ExitCode.USER_ERROR
    metrics: dict[str, float] = {}
    samples: dict[str, Any] = {}
    for rank in ranks:
        for batch in batches:
            for strategy in STRATEGIES:
                case = Case(strategy, rank, batch)
                try:
                    of_case, raw = measure(lengths, case, args.steps)
                except UserError as error:
                    raise UserError(f"{case.name}: {error}") from None
                metrics |= {f"{case.name}/{name}": value for name, value in of_case.items()}
                samples |= {f"{case.name}/{name}": values for name, values in raw.items()}
                print(f"{case.name}: p99 {of_case['imbalance_p99']:.4f}, plan {of_case['plan_ms']:.2f} ms", flush=True)
    text = tables(metrics, ranks, batches) + "\n" + bars(metrics) + "\n"
    if not args.no_start:
        starts = measure_start(NUM_SAMPLES_AT_START)
        for strategy, of_start in starts.items():
            metrics |= {f"planner/{strategy}/{name}_160m": value for name, value in of_start.items()}
        metrics["planner/startup_s_160m"] = max(f["startup_s"] for f in starts.values())
        metrics["planner/rss_mib_160m"] = max(f["rss_mib"] for f in starts.values())
        rows = [(name, f"{f['startup_s']:.2f}", f"{f['rss_mib']:,.0f}") for name, f in starts.items()]
        text += (
            "\n"
            + markdown_table((f"{NUM_SAMPLES_AT_START:,} samples", "s to the first plan", "resident MiB"), rows)
            + "\n"
        )
    print("\n" + text)
    if args.out:
        folder = Path(args.out)
        write_atomically(folder / "balance.md", text)
        shown = tuple(b for b in (2, 4, 16) if b in batches) or batches[:3]
        draw(metrics, ranks, shown, folder / "imbalance.svg")
    if args.json:
        spike = args.share_at_maximum
        law = args.lengths or ("Wikipedia-like" if spike is None else f"uniform, {spike} of them 512")
        config = {
            "ranks": ranks,
            "batches": batches,
            "steps": args.steps,
            "lengths": law,
            "num_samples": len(lengths),
            "cost": {"linear": BERT_LARGE.linear, "quadratic": BERT_LARGE.quadratic},
            "node_size": NODE_SIZE,
            "threads": 1,
        }
        write_result(args.json, metrics, config, machine, samples)
    return 0


if __name__ == "__main__":
    sys.exit(main())
