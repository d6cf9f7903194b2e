#!/usr/bin/env python3
"""A proof of concept in an hour: your config with each switch that saves memory, some steps of each on this machine, one page.

    python scripts/memory_poc.py --config configs/mini_cpu.yaml --out results/poc
    python scripts/memory_poc.py --config ... --budget 24GiB --price-per-hour 2.5 run.price_per_kwh=0.3

Every variant is a run of its own through run_pretraining.py, with its ranks, its engine and its data. The page (memory.md and
memory.html) says of each: peak memory, measured and predicted, time of a step, energy, cost of a million samples, and whether
its losses are those of the config as it is; and what is recommended: the fastest within the budget that rounds no moments. What
cannot be had together is named with its reason. Energy is there where the machine meters it, money where you give a price.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from html import escape
from pathlib import Path
from statistics import median
from typing import Any

import guard  # noqa: F401

import torch

from bert_fast.command import guarded, not_negative, whole
from bert_fast.config import Config
from bert_fast.config.choices import ENGINES
from bert_fast.config.load import load_config
from bert_fast.config.yaml_files import to_yaml
from bert_fast.errors import UserError
from bert_fast.exit_codes import ExitCode
from bert_fast.files import write_atomically
from bert_fast.memory.budget import MACHINES, fit, gib, with_changes
from bert_fast.report.bench import environment, markdown_table, write_result
from bert_fast.report.html import document, section
from bert_fast.report.html_tables import number_table, table
from bert_fast.report.metrics import of_kind, read_metrics
from bert_fast.report.schema import StepLine
from bert_fast.train.setup.memory_fit import likely_hardware
from programs import pretrain

_SKIPPED = 1  # steps before those that are timed
# Relative differences of losses that still count as equal: sums in another order, and moments that are rounded
_EXACT, _OTHER_RANDOM, _ROUNDED = 1e-6, 0.05, 0.05
_ROUNDED_NOTE = "rounded moments"
_MILLION = 1e6


@dataclass(frozen=True)
class Variant:
    """The config with other switches. `tolerance`: of its losses; `note`: what else differs."""

    name: str
    changes: dict[str, Any]
    tolerance: float = _EXACT
    note: str = ""


@dataclass(frozen=True)
class Measured:
    """A variant that has run; memory in MiB of the rank that took most, None where there is no meter."""

    name: str
    overrides: list[str]
    peak_mib: float
    predicted_mib: float
    step_ms: float
    samples_per_s: float
    loss_difference: float
    tolerance: float
    note: str
    kwh: float | None

    @property
    def is_equal(self) -> bool:
        """Whether its losses are those of the config as it is."""
        return self.loss_difference <= self.tolerance


def variants(config: Config) -> Iterator[Variant]:
    """Each switch by itself, and those that go together."""
    yield Variant("as it is", {})
    for how in ("attention", "layer", "half_layer", "optimal"):
        yield Variant(f"recompute {how}", {"memory.recompute": how})
    batch = config.batch
    if batch.micro_batch_size % 2 == 0:
        halved = {
            "batch.micro_batch_size": batch.micro_batch_size // 2,
            "batch.gradient_accumulation_steps": 2 * batch.gradient_accumulation_steps,
        }
        dropout = config.model.hidden_dropout or config.model.attention_dropout
        random = {"tolerance": _OTHER_RANDOM, "note": "dropout draws other numbers"} if dropout else {}
        yield Variant("half the micro-batch", halved, **random)  # type: ignore[arg-type]
        yield Variant("half the micro-batch, recompute layer", {**halved, "memory.recompute": "layer"}, **random)  # type: ignore[arg-type]
    yield Variant("release gradients", {"memory.release_gradients": True})
    yield Variant(
        "release gradients, recompute optimal", {"memory.release_gradients": True, "memory.recompute": "optimal"}
    )
    sharded: dict[str, Any] = {"communication.shard_optimizer": True}
    parts: dict[str, Any] = {"communication.engine": "fsdp", "communication.bucket_mb": 25.0}
    if config.system.world_size > 1 and not ENGINES[config.communication.engine].shards:
        yield Variant("shard optimizer", sharded)
        yield Variant("shard optimizer, recompute optimal", {**sharded, "memory.recompute": "optimal"})
        yield Variant("fsdp", parts)
        yield Variant(
            "fsdp, weights kept from forward to backward", {**parts, "communication.reshard_after_forward": False}
        )
        if 1 < config.system.node_size < config.system.world_size:
            yield Variant("fsdp within a node", {**parts, "communication.shard_within_node": True})
        yield Variant("fsdp, recompute optimal", {**parts, "memory.recompute": "optimal"})
    for state in ("bf16", "int8", "int4"):
        yield Variant(f"moments in {state}", {"optimizer.state_dtype": state}, _ROUNDED, _ROUNDED_NOTE)
    yield Variant("moments on the host", {"optimizer.state_on_host": True})
    yield Variant("activations on the host", {"memory.offload_activations": True})
    yield Variant("weights on the host", {**parts, "memory.offload_weights": True})


def fastest(config: Config, on_cpu: bool, budget_gib: float) -> Variant:
    """What the budget asks for. Raises UserError where nothing fits."""
    kind = "cpu" if on_cpu else "cuda"
    found = fit(config, budget_gib, likely_hardware(config, kind), MACHINES[kind])
    changes = {name: value for name, value in found.changes().items() if value is not None}
    moved = "batch.micro_batch_size" in changes
    tolerance = _OTHER_RANDOM if moved else _EXACT
    return Variant(f"fastest in {budget_gib:g} GiB", changes, tolerance, "chosen by the model of times")


def measure(
    args: argparse.Namespace, variant: Variant, baseline: list[float] | None, folder: Path
) -> tuple[Measured, list[float]]:
    """Run a variant; what it took, and its losses. Raises UserError where it fails."""
    overrides = [f"{name}={_plain(value)}" for name, value in variant.changes.items()]
    fixed = [
        f"train.max_steps={args.steps}", "train.log_every_steps=1", "evaluation.target_accuracy=null",
        "evaluation.every_samples=1000000000", "evaluation.num_samples=64", "checkpoint.save_final_model=false",
        "checkpoint.every_steps=0", "checkpoint.async_save=true", "run.tensorboard=false", "run.measure_peak_flops=false",
        "mlperf.enabled=false",
    ]  # fmt: skip
    record = pretrain(args.config, [*args.overrides, *overrides, *fixed], folder, variant.name)
    lines = of_kind(read_metrics(folder), StepLine)
    losses = [line.loss for line in lines]
    rates = [line.samples_per_s for line in lines[_SKIPPED:]] or [lines[-1].samples_per_s]
    memory, batch = record.peak_memory, record.config["batch"]["global_batch_size"]
    pairs = zip(losses, baseline or losses, strict=True)
    return (
        Measured(
            name=variant.name,
            overrides=overrides,
            peak_mib=memory.device_mib or memory.growth_mib or memory.host_mib,
            predicted_mib=memory.planned_mib or 0.0,
            step_ms=1e3 * batch / median(rates),
            samples_per_s=median(rates),
            loss_difference=max(abs(own / other - 1) for own, other in pairs),
            tolerance=variant.tolerance,
            note=variant.note,
            kwh=record.energy.kwh,
        ),
        losses,
    )


def _plain(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else f"{value}"


def recommended(rows: list[Measured], budget_gib: float | None) -> Measured | None:
    """The fastest whose losses are equal and whose peak is within the budget; None: none is."""
    fitting = [row for row in rows if row.is_equal and row.note != _ROUNDED_NOTE]
    if budget_gib is not None:
        fitting = [row for row in fitting if row.peak_mib <= 1024 * budget_gib]
    return min(fitting, key=lambda row: row.step_ms, default=None)


HEAD = (
    "variant", "peak MiB", "of the first", "predicted", "error", "ms a step", "of the first", "losses differ by", "equal", "Wh",
    "cost of 1 M samples",
)  # fmt: skip


def cells(rows: list[Measured], args: argparse.Namespace, steps: int) -> list[list[str]]:
    """The rows of the page's table."""
    first = rows[0]
    return [
        [
            row.name,
            f"{row.peak_mib:,.0f}",
            f"{row.peak_mib / first.peak_mib:.2f}",
            f"{row.predicted_mib:,.0f}",
            f"{100 * (row.predicted_mib / row.peak_mib - 1):+.1f} %",
            f"{row.step_ms:,.1f}",
            f"{row.step_ms / first.step_ms:.2f}",
            f"{row.loss_difference:.1e}",
            ("yes" if row.is_equal else "NO") + (f" ({row.note})" if row.note else ""),
            "–" if row.kwh is None else f"{1e3 * row.kwh:.2f}",
            "–" if args.price_per_hour is None else f"{args.price_per_hour * _MILLION / row.samples_per_s / 3600:,.2f}",
        ]
        for row in rows
    ]


def write_pages(
    out: Path, args: argparse.Namespace, config: Config, rows: list[Measured], refused: dict[str, str]
) -> list[str]:
    """memory.md and memory.html; returns the lines of the conclusion."""
    best = recommended(rows, args.budget)
    within = "" if args.budget is None else f" within {args.budget:.2f} GiB"
    if best is None:
        conclusion = [f"No variant with equal losses stays{within or ' equal'}."]
    else:
        what, first = " ".join(best.overrides) or "nothing to change", rows[0]
        conclusion = [
            f"Recommended{within}: {best.name} ({what}): {best.peak_mib:,.0f} MiB and {best.step_ms:,.1f} ms a step, "
            f"{best.peak_mib / first.peak_mib:.2f} and {best.step_ms / first.step_ms:.2f} of the config as it is."
        ]
    failed = [row.name for row in rows if not row.is_equal]
    if failed:
        conclusion.append(f"Losses are NOT equal: {', '.join(failed)}.")
    shown, machine = cells(rows, args, args.steps), environment()
    facts = [
        ("config", f"{args.config} {' '.join(args.overrides)}"),
        ("machine", f"{machine['cpu']}, {machine['cores']} cores, {_device()}, {machine['packages']['torch']} torch"),
        ("ranks", f"{config.system.world_size}"),
        ("steps of each", f"{args.steps}, of which the first {_SKIPPED} is not timed"),
        (
            "peak",
            "torch's allocations on the device; on a CPU, growth of resident memory from before the model was built, of which "
            "some 200 MiB are code and tables that libraries load when they are first used",
        ),
        ("predicted", "for the longest micro-batch that the config allows: what was run may hold shorter samples"),
    ]
    refusals = [[name, reason] for name, reason in refused.items()]
    text = [
        f"# Memory and time of {config.run.name}", "", *conclusion, "", *(f"- {name}: {value}" for name, value in facts), "",
        markdown_table(HEAD, shown), "", "Not to be had here:", "", *(f"- {name}: {reason}" for name, reason in refusals), "",
    ]  # fmt: skip
    write_atomically(out / "memory.md", "\n".join(text))
    html = document(
        f"Memory and time of {config.run.name}",
        [
            f"<header><h1>{escape(f'Memory and time of {config.run.name}')}</h1></header>",
            section("What to do", "".join(f"<p>{escape(line)}</p>" for line in conclusion)),
            section("What was run", table(facts)),
            section("Measured", number_table(HEAD, shown)),
            section("Not to be had here", table([(name, reason) for name, reason in refusals])),
        ],
    )
    write_atomically(out / "memory.html", html)
    if best is not None and best.overrides:
        write_atomically(out / "recommended.yaml", to_yaml(_nested(best.overrides)))
    return conclusion


def _nested(overrides: list[str]) -> dict[str, Any]:
    tree: dict[str, dict[str, str]] = {}
    for override in overrides:
        path, _, value = override.partition("=")
        name, _, field = path.partition(".")
        tree.setdefault(name, {})[field] = value
    return tree


def _device() -> str:
    return torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"


@guarded
def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", required=True, help="the run's config")
    parser.add_argument("overrides", nargs="*", metavar="section.field=value", help="settings in place of the config's")
    parser.add_argument("--out", default="results/memory_poc", metavar="FOLDER", help="default %(default)s")
    parser.add_argument("--steps", type=whole(2, 10_000), default=6, help="of each variant (default %(default)s)")
    parser.add_argument("--budget", metavar="SIZE", help="memory of a rank, such as 24GiB")
    parser.add_argument("--price-per-hour", type=not_negative, help="of all devices together, in your currency")
    args = parser.parse_intermixed_args()
    args.budget = gib(args.budget) if args.budget else None
    args.overrides += ["memory.recompute=none", "memory.budget_gib=null"]  # what is tried here
    config = load_config(args.config, args.overrides)
    on_cpu = config.system.device == "cpu" or not torch.cuda.is_available()
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    planned = list(variants(config))
    if args.budget is not None:
        planned.append(fastest(config, on_cpu, args.budget))
    rows: list[Measured] = []
    refused: dict[str, str] = {}
    baseline: list[float] | None = None
    for variant in planned:
        try:
            with_changes(config, {**variant.changes, "system.device": "cpu" if on_cpu else "cuda"})
            with tempfile.TemporaryDirectory() as scratch:
                row, losses = measure(args, variant, baseline, Path(scratch) / "run")
        except UserError as error:  # of the switches, or of a run that does not fit
            refused[variant.name] = str(error).removeprefix("config: ")
            print(f"{variant.name}: not to be had: {refused[variant.name]}", flush=True)
            continue
        baseline = baseline or losses
        rows.append(row)
        print(f"{row.name}: {row.peak_mib:,.0f} MiB, {row.step_ms:,.1f} ms a step", flush=True)
    if not rows:
        raise UserError(f"no variant of {args.config} could be run; the first: {next(iter(refused.values()))}")
    for line in write_pages(out, args, config, rows, refused):
        print(line)
    metrics = {
        "combinations_passed": sum(row.is_equal for row in rows),
        "combinations_failed": sum(not row.is_equal for row in rows),
        "combinations_refused": len(refused),
    }
    samples = {"rows": [asdict(row) for row in rows], "refused": refused}
    write_result(
        out / "memory.json", metrics, {"config": args.config, "overrides": args.overrides}, environment(), samples
    )
    print(f"{out / 'memory.html'}")
    return ExitCode.OK if not metrics["combinations_failed"] else ExitCode.USER_ERROR


if __name__ == "__main__":
    sys.exit(main())
