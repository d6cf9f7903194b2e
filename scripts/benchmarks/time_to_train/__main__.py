#!/usr/bin/env python3
"""Time to train, ours against the transformers baseline or a record against its yardstick: interleaved pairs of one seed.

    python -m scripts.benchmarks.time_to_train --json results/mini_cpu/time_to_train.json      # 5 pairs
    python -m scripts.benchmarks.time_to_train --record --json results/mini_record/time_to_train.json
    python -m scripts.benchmarks.time_to_train --quick                                         # under a minute
    python -m scripts.benchmarks.time_to_train --config configs/mini_cpu.yaml --pairs 3 optimizer.lr=0.002 --out raw/

A pair is run_pretraining.py and the baseline (baseline_hf.py beside this file), one after the other with one config and one
seed; with --record it is run_pretraining.py with the config and with configs/mini_record.yaml. Who goes first alternates, so
that a slow drift of the machine falls on both. The result is the median over pairs of the ratio of their times. A pair of
which a run missed the target gives no ratio. With --quick both are cut after a fixed number of steps, no target can be
reached, and the ratio is of the training time per sample.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import scripts.guard  # noqa: F401

from bert_fast.command import guarded, whole
from bert_fast.config import Config, as_plain
from bert_fast.config.load import load_config
from bert_fast.errors import UserError
from bert_fast.exit_codes import ExitCode
from bert_fast.files import write_json
from bert_fast.launch.provenance import commit
from bert_fast.report import bench
from bert_fast.train import main as entry
from bert_fast.train.setup.inputs import check_inputs

from ... import programs

_METRICS = ("time_to_train_s", "samples_to_target", "target_reached", "final_accuracy", "samples_per_s", "tokens_per_s")
_NO_METRICS = {"seed", "first"}
_PAIRS = 5
_TASK = (  # what a record and its yardstick must have in common
    ("evaluation", "data"),
    ("evaluation", "num_samples"),
    ("evaluation", "target_accuracy"),
    ("data", "train"),
    ("checkpoint", "init_from"),
    ("system", "world_size"),
    ("system", "device"),
)
_QUICK_STEPS = 40
_QUICK = (
    f"train.max_steps={_QUICK_STEPS}",
    "evaluation.target_accuracy=0.999",
    "evaluation.every_samples=1000000000",
    "evaluation.start_samples=null",
    "evaluation.at_start=false",
)

Metrics = dict[str, Any]
Pair = dict[str, Metrics]


@dataclass(frozen=True)
class Comparison:
    """The two sides of each pair, by the names that their metrics have; `fast` is expected to take less time."""

    fast: str
    slow: str
    titles: dict[str, str]

    @property
    def sides(self) -> tuple[str, str]:
        return self.fast, self.slow

    @property
    def time_ratio(self) -> str:
        """The name of the ratio of the times to train."""
        return f"time_to_train_ratio_{self.slow}_over_{self.fast}"

    @property
    def throughput_ratio(self) -> str:
        """The name of the ratio of samples per second, evaluations left out: the inverse ratio of times per sample."""
        return f"throughput_ratio_{self.fast}_over_{self.slow}"

    def order(self, pair: int) -> tuple[str, ...]:
        """Who goes first in a pair."""
        return self.sides if pair % 2 else self.sides[::-1]

    def time_of(self, pair: Pair, quick: bool) -> float | None:
        """Slow over fast: of times to train, None if a run missed the target; of times per sample if quick."""
        if quick:
            return self.throughput_of(pair)
        if not all(pair[side]["target_reached"] for side in self.sides):
            return None
        return float(pair[self.slow]["time_to_train_s"] / pair[self.fast]["time_to_train_s"])

    def throughput_of(self, pair: Pair) -> float:
        """Fast over slow."""
        return float(pair[self.fast]["samples_per_s"] / pair[self.slow]["samples_per_s"])


BASELINE = Comparison("ours", "hf", {"ours": "ours", "hf": "baseline"})
RECORD = Comparison("record", "mini", {"record": "record", "mini": "mini"})


def run_one(side: str, pair: int, args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Run one side to its end; its record. Raises UserError if it failed."""
    name = f"pair-{pair}-{side}"
    kept = Path(args.out) / f"{name}.json" if args.out else None
    if args.resume and kept and kept.is_file():
        record: dict[str, Any] = json.loads(kept.read_text(encoding="utf-8"))
        return record
    config = args.record if side == RECORD.fast else args.config
    settings = ["--config", config, *args.overrides, *(_QUICK if args.quick else ()), f"train.seed={pair}"]
    if side != BASELINE.slow:
        result = folder / name / "metrics.json"
        program = [str(programs.ROOT / "run_pretraining.py"), *settings, f"run.folder={folder / name}"]
    else:
        result = folder / f"{name}.json"
        allocator = ["--our-allocator"] if args.our_allocator else []
        program = ["-m", "scripts.benchmarks.time_to_train.baseline_hf", *settings, "--json", str(result), *allocator]
    record = programs.run(program, result, f"pair {pair}: {args.comparison.titles[side]}")
    if kept:
        record["config"]["run"]["folder"] = None  # a temporary folder that will be gone
        write_json(kept, record)
    return record


def run_pairs(args: argparse.Namespace) -> list[Pair]:
    """All runs, one after the other; the metrics of every pair by side."""
    pairs: list[Pair] = []
    with tempfile.TemporaryDirectory() as folder:
        for number in range(1, args.pairs + 1):
            pair: Pair = {}
            for side in args.comparison.order(number):
                record = run_one(side, number, args, Path(folder))
                metrics = record["metrics"]
                pair[side] = {name: metrics[name] for name in _METRICS}
                if side != BASELINE.slow:
                    seconds = record["time_split_s"].get("evaluation", 0.0)
                    pair[side]["evaluation_share"] = seconds / metrics["time_to_train_s"]
                print(
                    f"pair {number}/{args.pairs}, {args.comparison.titles[side]}: {_one_line(metrics, args.quick)}",
                    flush=True,
                )
            pairs.append(pair)
    return pairs


def _one_line(metrics: Metrics, quick: bool) -> str:
    verdict = "" if quick else (", target reached" if metrics["target_reached"] else ", target NOT reached")
    return (
        f"{metrics['time_to_train_s']:.1f} s, {metrics['samples_to_target']:,} samples, "
        f"{metrics['samples_per_s']:,.0f} samples/s, accuracy {metrics['final_accuracy']:.4f}{verdict}"
    )


def raw_samples(pairs: list[Pair], quick: bool, comparison: Comparison = BASELINE) -> dict[str, list[Any]]:
    """The repeats behind every metric, in the order of pairs."""
    samples: dict[str, list[Any]] = {
        f"{name}/{side}": [pair[side][name] for pair in pairs] for name in _METRICS for side in comparison.sides
    }
    for side in comparison.sides:
        if side != BASELINE.slow:
            name = "evaluation_share" if side == comparison.fast else f"evaluation_share/{side}"
            samples[name] = [pair[side]["evaluation_share"] for pair in pairs]
    samples[comparison.time_ratio] = [comparison.time_of(pair, quick) for pair in pairs]
    samples[comparison.throughput_ratio] = [comparison.throughput_of(pair) for pair in pairs]
    samples["seed"] = list(range(1, len(pairs) + 1))
    samples["first"] = [comparison.order(number)[0] for number in samples["seed"]]
    return samples


def summarise(samples: dict[str, list[Any]], comparison: Comparison = BASELINE) -> dict[str, float | None]:
    """Medians over pairs; None where no pair has the metric."""
    ratios = [ratio for ratio in samples[comparison.time_ratio] if ratio is not None]
    metrics: dict[str, float | None] = {comparison.time_ratio: None, "num_ratios": len(ratios)}
    left_out = {*_NO_METRICS, comparison.time_ratio}
    metrics |= {name: statistics.median(values) for name, values in samples.items() if name not in left_out}
    if ratios:
        metrics[comparison.time_ratio] = statistics.median(ratios)
    return metrics


def table(samples: dict[str, list[Any]], metrics: dict[str, float | None], comparison: Comparison = BASELINE) -> str:
    """Every pair and the medians: seconds, samples, final accuracy, samples per second."""
    headers = ["pair", "first"]
    for what in ("s", "samples", "acc.", "rate"):
        headers += [f"{what} {side}" for side in comparison.sides]
    headers.append("ratio")
    columns = ("time_to_train_s", "samples_to_target", "final_accuracy", "samples_per_s")
    formats = ("{:,.1f}", "{:,.0f}", "{:.4f}", "{:,.0f}")

    def row(label: str, first: str, value: Any, ratio: float | None) -> list[str]:
        cells = [
            text.format(value(f"{name}/{side}"))
            for name, text in zip(columns, formats, strict=True)
            for side in comparison.sides
        ]
        return [label, first, *cells, "none" if ratio is None else f"{ratio:.3f}"]

    ratios = samples[comparison.time_ratio]
    rows = [
        row(str(seed), samples["first"][i], lambda name, i=i: samples[name][i], ratios[i])
        for i, seed in enumerate(samples["seed"])
    ]
    rows.append(row("median", "", lambda name: metrics[name], metrics[comparison.time_ratio]))
    return bench.markdown_table(headers, rows)


def run(args: argparse.Namespace) -> int:
    """Check, run, report."""
    config = _checked_config(args)
    environment = {
        **bench.environment(),
        "commit": commit(),
    }  # before the runs: the load they find, not the load they make
    comparison: Comparison = args.comparison
    samples = raw_samples(run_pairs(args), args.quick, comparison)
    metrics = summarise(samples, comparison)
    ratio_of = f"time per sample (quick: {_QUICK_STEPS} steps, no target)" if args.quick else "time to train"
    print(f"\n{table(samples, metrics, comparison)}\n")
    ratio = metrics[comparison.time_ratio]
    if ratio is None:
        print("no ratio: in every pair a run missed the target")
    else:
        repeats = f"median of {metrics['num_ratios']} pair{'s' if metrics['num_ratios'] != 1 else ''}"
        slow, fast = (comparison.titles[side] for side in (comparison.slow, comparison.fast))
        print(f"ratio of {ratio_of}, {slow} over {fast}: {ratio:.3f} ({repeats})")
        if comparison is RECORD:
            print(f"evaluation takes {100 * (metrics['evaluation_share'] or 0):.1f} % of the record's time to train")
    if args.json:
        what = {
            "file": args.config,
            "overrides": args.overrides,
            "pairs": args.pairs,
            "quick": args.quick,
            "ratio_of": ratio_of,
            **(
                {"record": args.record}
                if comparison is RECORD
                else {"baseline_allocator": "as ours" if args.our_allocator else "the system's"}
            ),
            **as_plain(config),
        }
        bench.write_result(args.json, metrics, what, environment, samples)
    return ExitCode.OK if ratio is not None else ExitCode.TARGET_MISSED


def _checked_config(args: argparse.Namespace) -> Config:
    """The config of both sides, with what is known to fail refused before the first run."""
    config = load_config(args.config, [*args.overrides, *(_QUICK if args.quick else ())])
    if args.pairs is None:
        args.pairs = 1 if args.quick else _PAIRS
    if args.pairs < 1:
        raise UserError(f"--pairs {args.pairs} must be at least 1")
    if config.evaluation.target_accuracy is None:
        raise UserError(
            f"{args.config} has no evaluation.target_accuracy, so no time to train; set one, or use --quick"
        )
    check_inputs(config)
    if args.comparison is RECORD:
        check_record(config, args)
    return config


def check_record(config: Config, args: argparse.Namespace) -> None:
    """Refuse a record that has another task than the config that it is measured by. Raises UserError."""
    record = load_config(args.record, [*args.overrides, *(_QUICK if args.quick else ())])
    for section, name in _TASK:
        values = [getattr(getattr(each, section), name) for each in (config, record)]
        if values[0] != values[1]:
            raise UserError(
                f"{args.record} has {section}.{name}={values[1]} and {args.config} {values[0]}: no record of the same task; "
                "make them equal"
            )
    check_inputs(record)


@guarded
def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--config", metavar="FILE", default="configs/mini_cpu.yaml", help="config of both sides (%(default)s)"
    )
    parser.add_argument("overrides", nargs="*", metavar="section.field=value", help="settings that replace the file's")
    parser.add_argument(
        "--pairs", type=whole(1, 10**6), metavar="N", help=f"pairs of runs (default {_PAIRS}; 1 with --quick)"
    )
    parser.add_argument("--out", metavar="FOLDER", help="also keep the record of every run there")
    parser.add_argument("--resume", action="store_true", help="take runs whose records are in --out already as done")
    parser.add_argument(
        "--record",
        metavar="FILE",
        nargs="?",
        const="configs/mini_record.yaml",
        help="compare with this config instead of the baseline (%(const)s)",
    )
    parser.add_argument(
        "--our-allocator", action="store_true", help="give the baseline our allocator setting too (CPU)"
    )
    bench.add_arguments(parser)
    args = parser.parse_intermixed_args()
    args.comparison = RECORD if args.record else BASELINE
    if args.record and args.our_allocator:
        parser.error("--our-allocator is of the baseline, which --record leaves out; remove one")
    return entry.guarded(lambda: run(args))


if __name__ == "__main__":
    sys.exit(main())
