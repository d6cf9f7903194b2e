#!/usr/bin/env python3
"""Break runs on purpose and see whether what is promised of failures is true: a table, and figures by name.

    python -m scripts.faults.drill --kills 50 --json results/faults/drill.json --out results/faults
    python -m scripts.faults.drill --kills 0 --only stop,nan

Every run is of the mini benchmark's data with a small model and two ranks; after each fault its losses and final weights
are compared, bit for bit, with those of a run that was left alone. Some drills mount file systems or cut a link between two
network namespaces: they need root and say so where it is missing. Takes about 20 s a kill on two cores.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import scripts.guard  # noqa: F401

from bert_fast.command import guarded, whole
from bert_fast.errors import UserError
from bert_fast.exit_codes import ExitCode
from bert_fast.files import write_atomically, write_json
from bert_fast.hardware import cpu_name
from bert_fast.report.bench import environment
from bert_fast.report.metrics import read_metrics

from . import drills
from .watched import Drill

ROOT = Path(__file__).resolve().parents[2]

SMALL = (
    "checkpoint.init_from=null",
    "evaluation.target_accuracy=null",
    "evaluation.every_samples=1600",
    "evaluation.num_samples=256",
    "model.hidden_size=64",
    "model.num_layers=2",
    "model.num_heads=2",
    "model.intermediate_size=128",
    "batch.global_batch_size=16",
    "batch.micro_batch_size=8",
    "run.measure_peak_flops=false",
    "run.tensorboard=false",
    "mlperf.enabled=true",
    "train.warmup_batches=1",
)
BIG = (
    "checkpoint.init_from=null",
    "evaluation.target_accuracy=null",
    "evaluation.every_samples=100000000",
    "model.hidden_size=512",
    "model.num_layers=6",
    "model.num_heads=8",
    "model.intermediate_size=2048",
    "batch.global_batch_size=8",
    "batch.micro_batch_size=4",
    "run.measure_peak_flops=false",
    "run.tensorboard=false",
)


def checkpoint_stall(config: Path, folder: Path, checkpoints: int = 24, every: int = 6) -> dict[str, Any]:
    """What a checkpoint costs, in one run of checkpoints written beside training, waited for, and left out, in turn.

    Returns:
        Medians: `stall_s`, what training waits for one that is written beside it; `synchronous_s`, for one that it waits for;
        `slower_s`, by how much the steps after one beside training take longer, in all, than after none.
    """
    drill = Drill(config, folder, BIG, steps=every * checkpoints + 1, every=every, timeout_s=120)
    run = drill.new_folder("stall")
    ended = drill.run(run, "checkpoint.keep_last=1", fault={"action": "alternate", "rank": -1})
    if ended.code != ExitCode.OK:
        raise UserError(f"the run that measures checkpoints ended with {ended.code}: {ended.output[-300:]}")
    record = json.loads((run / "metrics.json").read_text(encoding="utf-8"))
    rows = record["checkpoints"][4:]  # buffers are made in the first
    times = {line.step: line.time_s for line in read_metrics(run) if line.kind == "step"}
    for row in rows:
        step = int(row["step"])
        row["steps_after_s"] = times[step + every] - times[step] if step + every in times else None
    size = sum(p.stat().st_size for p in next((run / "checkpoints").glob("step-*")).iterdir())

    def median(kind: str, name: str) -> float:
        return statistics.median(row[name] for row in rows if row["kind"] == kind and row[name] is not None)

    stall, sync = median("beside", "stall_s"), median("waited for", "stall_s")
    return {
        "checkpoint_mib": size / 2**20,
        "stall_s": stall,
        "synchronous_s": sync,
        "share": stall / sync,
        "written_beside_s": median("beside", "total_s"),
        "slower_s": median("beside", "steps_after_s") - median("none", "steps_after_s"),
        "slower_waited_for_s": median("waited for", "steps_after_s") - median("none", "steps_after_s"),
        "records": rows,
    }


def run_drills(
    against: drills.Against,
    kills: int,
    only: set[str],
    scratch: Path,
    store: Path,
    seed: int,
    note: Callable[[str], None],
) -> list[dict[str, Any]]:
    """All rows of the table."""
    rng = random.Random(seed)
    rows = []
    moments = list(drills.MOMENTS)
    for number in range(kills):
        rows.append(drills.kill(against, rng, moments[number % len(moments)]))
        note(f"kill {number + 1} of {kills}: {_verdict(rows[-1])}")
    others: dict[str, Callable[[], dict[str, Any]]] = {
        **{
            f"kill with {name}": lambda name=name: drills.kill_with_format(against.drill, rng, name)  # type: ignore[misc]
            for name in drills.LOSSY
        },
        "stop": lambda: drills.silence(against, "stop"),
        "hang": lambda: drills.silence(against, "hang"),
        "silent disk": lambda: drills.silent_disk(against),
        "nan": lambda: drills.not_a_number(against),
        "skew": lambda: drills.skewed_clock(against),
        "damaged": lambda: drills.damaged_checkpoint(against),
        "disk": lambda: drills.full_disk(against, scratch / "disk"),
        "read-only": lambda: drills.read_only_results(against),
        "vanishes": lambda: drills.lost_data(against, store, "vanishes"),
        "changes": lambda: drills.lost_data(against, store, "changes"),
        "network": lambda: drills.cut_network(against),
    }
    unknown = only - others.keys()
    if unknown:
        raise UserError(f"--only: no drill {', '.join(sorted(unknown))}; there are {', '.join(others)}")
    for name, drill in others.items():
        if not only or name in only:
            rows.append(drill())
            note(f"{name}: {_verdict(rows[-1])}")
    return rows


def figures(rows: list[dict[str, Any]], stall: dict[str, Any] | None) -> dict[str, Any]:
    """The figures by name."""
    killed = [row for row in rows if row["fault"].startswith("kill") and " with " not in row["fault"]]
    detected = [row["detect_s"] for row in rows if row.get("detect_s") is not None]
    return {
        "kills": len(killed),
        "recovered_exactly": sum(row["kept"] for row in killed),
        "hangs": sum(bool(row.get("hung")) for row in rows),
        "detect_s_max": max(detected, default=None),
        "detect_s_max_after_kill": max(
            (row["detect_s"] for row in killed if row["detect_s"] is not None), default=None
        ),
        "checkpoint_stall_share": stall["share"] if stall else None,
        "checkpoint_slower_share": stall["slower_s"] / stall["slower_waited_for_s"] if stall else None,
        "drills": len(rows),
        "promises_kept": sum(bool(row["kept"]) for row in rows),
        "not_run": sum(row["kept"] is None for row in rows),
    }


def _verdict(row: dict[str, Any]) -> str:
    word = {True: "kept", False: "BROKEN", None: "not run"}[row["kept"]]
    took = f", noticed in {row['detect_s']:.1f} s" if row.get("detect_s") is not None else ""
    return f"{word} ({row['fault']}{took}) {row.get('says', '')[:140]}"


def table(record: dict[str, Any]) -> str:
    """The drill as a Markdown page."""
    names = record["figures"]
    lines = ["# Fault drills", "", f"`{record['command']}`, {cpu_name()}, two ranks.", ""]
    lines += ["| figure | value |", "| --- | --- |"]
    lines += [
        f"| `{name}` | {value:.3g} |" if isinstance(value, float) else f"| `{name}` | {value} |"
        for name, value in names.items()
    ]
    lines += [
        "",
        "| fault | times | promise | kept | noticed by all others, s (largest) | what is said |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for fault in dict.fromkeys(row["fault"] for row in record["rows"]):
        group = [row for row in record["rows"] if row["fault"] == fault]
        detected = [row["detect_s"] for row in group if row.get("detect_s") is not None]
        kept = "not run" if group[0]["kept"] is None else f"{sum(bool(row['kept']) for row in group)} of {len(group)}"
        said = group[0].get("says", "").replace("|", "/")
        lines.append(
            f"| {fault} | {len(group)} | {group[0]['promise']} | {kept} | {max(detected, default=0):.1f} | {said} |"
        )
    stall = record.get("checkpoint")
    if stall:
        lines += ["", stall_text(stall)]
    return "\n".join(lines) + "\n"


def stall_text(stall: dict[str, Any]) -> str:
    """What `checkpoint_stall` has found, as a paragraph of the page."""
    stall_ms, sync_ms, slower_ms, waited_ms = (
        1e3 * stall[name] for name in ("stall_s", "synchronous_s", "slower_s", "slower_waited_for_s")
    )
    return (
        f"Checkpoints of {stall['checkpoint_mib']:.0f} MiB, in turn written beside training, waited for, and left out, in one "
        f"run (medians): training waits {stall_ms:.1f} ms for one beside it and {sync_ms:.0f} ms for one that it waits for: "
        f"{100 * stall['share']:.1f} %. With both cores busy training, writing takes its time from them all the same: the "
        f"steps after one beside training take {slower_ms:.0f} ms longer in all than after none, {waited_ms:.0f} ms after one "
        "that is waited for."
    )


@guarded
def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--config", type=Path, default=ROOT / "configs" / "mini_cpu.yaml", help="config over the store to use"
    )
    parser.add_argument("--kills", type=whole(0, 10**6), default=50, help="how many times a random rank is killed (50)")
    parser.add_argument("--only", default="", help="names of the other drills, comma-separated; all of them if unset")
    parser.add_argument("--steps", type=whole(1, 10**9), default=40, help="steps of a run (40)")
    parser.add_argument("--seed", type=whole(0, 2**63 - 1), default=0, help="of ranks, steps and moments")
    parser.add_argument("--no-stall", action="store_true", help="do not measure what a checkpoint costs")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write figures and all rows")
    parser.add_argument("--out", type=Path, metavar="DIR", help="write README.md, a table")
    args = parser.parse_args()
    from bert_fast.config.load import load_config

    config = load_config(str(args.config), [])
    source = Path(config.data.train).parent
    if not (source / "train" / "manifest.json").is_file():
        raise UserError(f"no data at {source}; make it with `make data`")
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="fault-drill-") as name:
        scratch = Path(name)
        store = scratch / "store"
        shutil.copytree(source, store)
        drill = Drill(args.config, scratch / "runs", SMALL, steps=args.steps, every=8)
        stall = None if args.no_stall else checkpoint_stall(args.config, scratch / "stall")
        if stall:
            print(
                f"checkpoint: waits {1e3 * stall['stall_s']:.1f} of {1e3 * stall['synchronous_s']:.0f} ms",
                flush=True,
            )
        against = drills.Against(drill)
        only = {each for each in args.only.split(",") if each}
        rows = run_drills(against, args.kills, only, scratch, store, args.seed, lambda text: print(text, flush=True))
        # The scratch folder is gone when one reads of it
        rows = [{**row, "says": row["says"].replace(f"{name}/", "")} for row in rows]
    record = {
        "command": "python -m scripts.faults.drill " + " ".join(sys.argv[1:]),
        "machine": environment(),
        "settings": list(SMALL),
        "seconds": round(time.monotonic() - began, 1),
        "figures": figures(rows, stall),
        "checkpoint": stall,
        "rows": rows,
    }
    if args.json:
        write_json(args.json, record)
    if args.out:
        write_atomically(args.out / "README.md", table(record))
    print(json.dumps(record["figures"], indent=2))
    broken = [row for row in rows if row["kept"] is False]
    return ExitCode.TARGET_MISSED if broken else ExitCode.OK


if __name__ == "__main__":
    sys.exit(main())
