#!/usr/bin/env python3
"""Run one config with several seeds, one after the other, and record samples and time to target.

    python scripts/run_seeds.py --config configs/mini_cpu.yaml --seeds 10 --out results/mini_cpu

With `--with FOLDER`, our records that `python -m scripts.benchmarks.time_to_train --out FOLDER` left there are counted as seeds
already run. Writes result_SEED.txt (raw MLPerf logs) and seeds.json (metrics by name, raw values, config, environment), and
prints a table.
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

import guard  # noqa: F401

from bert_fast.command import guarded, whole
from bert_fast.config import Config, as_plain
from bert_fast.config.load import load_config
from bert_fast.errors import UserError
from bert_fast.exit_codes import ExitCode
from bert_fast.report.bench import add_arguments, environment, markdown_table, write_result
from bert_fast.report.schema import RunRecord, read_record
from bert_fast.run_folder import RESULT_LOG
from programs import pretrain

NAMES = (
    "time_to_train_s",
    "samples_to_target",
    "target_reached",
    "final_accuracy",
    "samples_per_s",
    "mfu",
    "first_step_s",
    "data_wait_share",
    "imbalance_mean",
    "compliance_passed",
)


def records_in(folder: str, config: Config) -> dict[int, RunRecord]:
    """Records of this config by seed that a paired benchmark left. Raises UserError if one is of another config or form."""
    records = {}
    for path in sorted(Path(folder).glob("pair-*-ours.json")):
        record = read_record(path)
        same = as_plain(config)
        same["train"]["seed"], same["run"]["folder"] = record.seed, record.config["run"].get("folder")
        if record.config != same:
            raise UserError(f"{path} is a record of another config; give --with the folder of this one")
        records[record.seed] = record
    return records


def values_of(records: list[RunRecord], name: str) -> list[float | None]:
    """A metric of each record by its name; None where it was not measured."""
    return [getattr(record.metrics, name) for record in records]


def summary(records: list[RunRecord]) -> dict[str, float]:
    """Metrics by name over the seeds: median, mean, spread, and MLPerf's olympic mean of the time."""
    metrics: dict[str, float] = {"seeds": len(records)}
    for name in NAMES:
        values = [float(value) for value in values_of(records, name) if value is not None]
        if not values:
            continue
        metrics[name] = statistics.median(values)
        metrics[f"{name}/mean"] = statistics.fmean(values)
        metrics[f"{name}/stdev"] = statistics.stdev(values) if len(values) > 1 else 0.0
    times = sorted(record.metrics.time_to_train_s for record in records)
    metrics["time_to_train_s/olympic_mean"] = statistics.fmean(times[1:-1] if len(times) > 4 else times)
    metrics["targets_reached"] = sum(record.metrics.target_reached for record in records)
    return metrics


def row_of(record: RunRecord) -> tuple[str, ...]:
    """The seed's row of the table."""
    metrics = record.metrics
    accuracy = "-" if metrics.final_accuracy is None else f"{metrics.final_accuracy:.4f}"
    reached = "yes" if metrics.target_reached else "no"
    return (
        str(record.seed),
        f"{metrics.time_to_train_s:.1f}",
        f"{metrics.samples_to_target:,}",
        accuracy,
        reached,
        f"{metrics.samples_per_s:.0f}",
    )


@guarded
def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="configs/mini_cpu.yaml", help="default %(default)s")
    parser.add_argument("--seeds", type=whole(1, 10**6), default=10, help="how many (default %(default)s)")
    parser.add_argument(
        "--first-seed", type=whole(0, 2**63 - 1), default=0, help="the first of them (default %(default)s)"
    )
    parser.add_argument("--with", dest="known", metavar="FOLDER", help="count the records of pairs there as seeds run")
    parser.add_argument("--out", metavar="FOLDER", help="keep raw logs and seeds.json there")
    parser.add_argument("overrides", nargs="*", metavar="section.field=value")
    add_arguments(parser)
    args = parser.parse_intermixed_args()
    overrides = list(args.overrides)
    if args.quick:
        args.seeds = 2
        overrides += ["train.max_steps=40", "evaluation.every_samples=1280"]
    config = load_config(args.config, overrides)
    known = records_in(args.known, config) if args.known else {}
    records = []
    rows = []
    with tempfile.TemporaryDirectory() as scratch:
        for seed in range(args.first_seed, args.first_seed + args.seeds):
            folder = Path(scratch) / f"seed{seed}"
            record = known.get(seed) or pretrain(
                args.config, [*overrides, f"train.seed={seed}"], folder, f"seed {seed}"
            )
            records.append(record)
            rows.append(row_of(record))
            print(f"seed {seed}: {rows[-1][1]} s, {rows[-1][2]} samples, accuracy {rows[-1][3]}", flush=True)
            if args.out and seed not in known:
                Path(args.out).mkdir(parents=True, exist_ok=True)
                shutil.copy(folder / RESULT_LOG, Path(args.out) / f"result_{seed}.txt")
    metrics = summary(records)
    samples: dict[str, Any] = {name: values_of(records, name) for name in NAMES}
    samples["curves"] = [[(e.samples, e.time_s, e.accuracy) for e in record.evaluations] for record in records]
    setting = {"config_file": args.config, "overrides": overrides, **as_plain(config)}
    machine = {**environment(), "run": records[0].environment, "data": records[0].as_json()["data"]}
    for path in filter(None, (args.json, str(Path(args.out) / "seeds.json") if args.out else None)):
        write_result(path, metrics, setting, machine, samples)
    print(markdown_table(("seed", "time to train s", "samples to target", "accuracy", "reached", "samples/s"), rows))
    print(
        f"reached by {metrics['targets_reached']} of {len(records)} seeds; time to train {metrics['time_to_train_s']:.1f} s "
        f"median, {metrics['time_to_train_s/olympic_mean']:.1f} s olympic mean; samples "
        f"{metrics['samples_to_target']:,.0f} median"
    )
    return ExitCode.OK if metrics["targets_reached"] == len(records) or args.quick else ExitCode.TARGET_MISSED


if __name__ == "__main__":
    sys.exit(main())
