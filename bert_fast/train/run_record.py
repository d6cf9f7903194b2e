"""The end of a run: its record (metrics.json), from which the checker's verdict and the report follow."""

from __future__ import annotations

from typing import Any

from bert_fast.config import as_plain
from bert_fast.files import write_json
from bert_fast.launch.provenance import commit
from bert_fast.model.flops import train_flops
from bert_fast.report.stragglers import text
from bert_fast.run_folder import PENDING_RECORD
from bert_fast.train.checkpoint.progress import Progress
from bert_fast.train.complete import TARGET_MISSED, complete
from bert_fast.train.context import RunContext
from bert_fast.train.environment import describe
from bert_fast.train.run import RunSummary
from bert_fast.train.telemetry.energy_meter import JOULES_PER_KWH, cost
from bert_fast.train.telemetry.hardware import peak_memory


def finish(context: RunContext, summary: RunSummary) -> dict[str, Any]:
    """Make the run's record and what follows from it (train.complete). Collective until the record is made."""
    memory = peak_memory(context.environment)
    if not context.environment.is_main:
        return {}
    write_json(context.folder / PENDING_RECORD, make_record(context, summary, memory))
    if context.environment.world_size > 1:
        context.log(text(summary.loop.metrics.stragglers.worst(3), context.heartbeat.hosts))
    return complete(context.folder)


def make_record(context: RunContext, summary: RunSummary, memory: dict[str, float]) -> dict[str, Any]:
    """The record of a run that is done; `memory` is `peak_memory` of all ranks."""
    config, state, prepared, data = context.config, summary.state, summary.prepared, summary.data
    progress, outcome = state.progress, summary.outcome
    reached = outcome.reached or config.evaluation.target_accuracy is None
    names = ("accuracy", "samples", "time_s")
    return {
        "metrics": _metrics(context, summary),
        "config": as_plain(config),
        "environment": {
            **describe(context.environment),
            "attention_backend": prepared.components.model.backend,
            "commit": commit(),
        },
        "samples": {f"eval_{name}": [e[name] for e in progress.evaluations] for name in names},
        "status": outcome.status if reached else TARGET_MISSED,
        "target_accuracy": config.evaluation.target_accuracy,
        "evaluations": progress.evaluations,
        "time_split_s": _time_split(context, summary),
        "init_s": prepared.init_s,
        "cost": {"linear": state.cost.linear, "quadratic": state.cost.quadratic, "source": state.cost_source},
        "sessions": progress.sessions,
        "peak_memory": memory,
        "stragglers": [one._asdict() for one in summary.loop.metrics.stragglers.worst(8)],
        "checkpoints": prepared.writer.records,
        "hosts": sorted(set(context.heartbeat.hosts)),
        "energy": energy_record(progress, context),
        "data": {
            "train": _data_entry(data.store.manifest),
            "eval": {**_data_entry(data.eval_store.manifest), "samples of training text": _shared_entry(summary)},
        },
        "shared_text": None if data.shared.is_held_out else [data.shared.found, data.shared.compared],
        "compliance": {"summary": "not checked (mlperf.enabled=false)"},
    }


def _metrics(context: RunContext, summary: RunSummary) -> dict[str, Any]:
    """The run's metrics by name, with their units in the names."""
    progress, prepared = summary.state.progress, summary.prepared
    training_s = summary.time_to_train_s - sum(context.clock.paused.values())
    flops = train_flops(context.config.model, progress.tokens, progress.tokens_squared, progress.masked)
    steps_here = max(1, progress.step - summary.first_step)  # of this session: bytes are counted anew in each
    counters, peak_flops = prepared.components.engine.counters(), prepared.peak_flops
    return {
        "time_to_train_s": summary.time_to_train_s,
        "samples_to_target": progress.samples,
        "target_reached": int(summary.outcome.reached),
        "final_accuracy": progress.evaluations[-1]["accuracy"] if progress.evaluations else None,
        "steps": progress.step,
        "samples_per_s": progress.samples / training_s,
        "tokens_per_s": progress.tokens / training_s,
        "imbalance_mean": progress.mean("imbalance"),
        "compute_imbalance": progress.mean("compute_imbalance"),
        "data_wait_share": progress.sums.get("data_s", 0.0) / training_s,
        "exposed_communication_s": progress.mean("exposed_s"),
        "first_step_s": progress.first_step_s,
        "mfu": flops / training_s / peak_flops if peak_flops else None,
        "matmul_peak_tflops": peak_flops / 1e12,
        "gradient_bytes_per_step": counters["gradient_bytes"] / steps_here,
        "weight_bytes_per_step": counters["weight_bytes"] / steps_here,
        "compliance_passed": None,
    }


def _time_split(context: RunContext, summary: RunSummary) -> dict[str, float]:
    """Where the time to train went, in seconds; the parts add up to it."""
    sums = summary.state.progress.sums
    split = {
        "forward and backward": sums.get("compute_s", 0.0),
        "exposed communication": sums.get("exposed_s", 0.0),
        "waiting for the slowest rank": sums.get("straggler_s", 0.0),
        "optimizer": sums.get("optimizer_s", 0.0),
        "data wait": sums.get("data_s", 0.0),
        **context.clock.paused,
    }
    return {**split, "other": max(0.0, summary.time_to_train_s - sum(split.values()))}


def energy_record(progress: Progress, context: RunContext) -> dict[str, Any]:
    """What the nodes' devices took from run_start to run_stop, with its price where one is given; None: not known."""
    gpu, cpu = (None if joules is None else joules / JOULES_PER_KWH for joules in progress.joules)
    known = [each for each in (gpu, cpu) if each is not None]
    kwh = sum(known) if known else None
    sessions = "all, each before the last up to its last checkpoint" if progress.sessions > 1 else "all"
    found = {"gpu_kwh": gpu, "cpu_kwh": cpu, "source": context.energy.source, "sessions": sessions}
    prices = context.config.run
    return {**found, "kwh": kwh, **cost(kwh, prices.price_per_kwh, prices.gco2_per_kwh)}


def _shared_entry(summary: RunSummary) -> str:
    shared = summary.data.shared
    return (
        f"{shared.found:,} of {shared.compared:,}, compared with {100 * shared.looked_at:.0f} % of the training store"
    )


def _data_entry(manifest: dict[str, Any]) -> dict[str, Any]:
    names = ("num_samples", "num_tokens", "mean_length", "max_length", "sha256", "text_sha256", "vocab_sha256")
    return {name: manifest.get(name) for name in names}
