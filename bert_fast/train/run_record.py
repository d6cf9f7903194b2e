"""The end of a run: figures by name, the checker's verdict, the report."""

from __future__ import annotations

from typing import Any

from bert_fast.communication.sharded import ShardedReducer
from bert_fast.config import as_plain
from bert_fast.files import write_json
from bert_fast.launch.provenance import commit
from bert_fast.model.flops import train_flops
from bert_fast.report.stragglers import text
from bert_fast.run_folder import PENDING_RECORD, TARGET_MISSED
from bert_fast.train.complete import complete
from bert_fast.train.loop import Outcome, Run
from bert_fast.train.telemetry.energy_meter import JOULES_PER_KWH, cost


def finish(run: Run, outcome: Outcome) -> dict[str, Any]:
    """Make the run's record and what follows from it (train.complete). Collective until the record is made."""
    memory = run.peak_memory()
    if not run.environment.is_main:
        return {}
    write_json(run.folder / PENDING_RECORD, _record(run, outcome, memory))
    if run.environment.world_size > 1:
        run.line.say(text(run.interval.stragglers.worst(3), run.heartbeat.hosts))
    return complete(run.folder)


def _record(run: Run, outcome: Outcome, memory: dict[str, float]) -> dict[str, Any]:
    progress, clock, config = run.progress, run.clock, run.config
    training = run.time_to_train - sum(clock.paused.values())
    flops = train_flops(config.model, progress.tokens, progress.tokens_squared, progress.masked)
    engine = run.machinery.engine
    steps_here = max(1, progress.step - run.first_step)  # of this session: bytes are counted anew in each
    sums = progress.sums
    split = {
        "forward and backward": sums.get("compute_s", 0.0),
        "exposed communication": sums.get("exposed_s", 0.0),
        "waiting for the slowest rank": sums.get("straggler_s", 0.0),
        "optimizer": sums.get("optimizer_s", 0.0),
        "data wait": sums.get("data_s", 0.0),
        **clock.paused,
    }
    split["other"] = max(0.0, run.time_to_train - sum(split.values()))
    last = progress.evaluations[-1] if progress.evaluations else None
    metrics = {
        "time_to_train_s": run.time_to_train,
        "samples_to_target": progress.samples,
        "target_reached": int(outcome.reached),
        "final_accuracy": last["accuracy"] if last else None,
        "steps": progress.step,
        "samples_per_s": progress.samples / training,
        "tokens_per_s": progress.tokens / training,
        "imbalance_mean": progress.mean("imbalance"),
        "compute_imbalance": progress.mean("compute_imbalance"),
        "data_wait_share": sums.get("data_s", 0.0) / training,
        "exposed_communication_s": progress.mean("exposed_s"),
        "first_step_s": progress.first_step_s,
        "mfu": flops / training / run.ceiling if run.ceiling else None,
        "matmul_peak_tflops": run.ceiling / 1e12,
        "gradient_bytes_per_step": engine.wire.bytes_sent / steps_here,
        "weight_bytes_per_step": engine.weight_bytes_sent / steps_here if isinstance(engine, ShardedReducer) else 0.0,
        "compliance_passed": None,
    }
    return {
        "metrics": metrics,
        "config": as_plain(config),
        "environment": {**run.environment_record(), "commit": commit()},
        "samples": {f"eval_{name}": [e[name] for e in progress.evaluations] for name in ("accuracy", "samples", "time_s")},
        "status": outcome.status if outcome.reached or config.evaluation.target_accuracy is None else TARGET_MISSED,
        "target_accuracy": config.evaluation.target_accuracy,
        "evaluations": progress.evaluations,
        "time_split_s": split,
        "init_s": run.init_s,
        "cost": {"linear": run.cost.linear, "quadratic": run.cost.quadratic, "source": run.cost_source},
        "sessions": progress.sessions,
        "peak_memory": memory,
        "stragglers": [one._asdict() for one in run.interval.stragglers.worst(8)],
        "checkpoints": run.saver.records,
        "hosts": sorted(set(run.heartbeat.hosts)),
        "energy": energy_record(run),
        "data": {
            "train": _data_entry(run.store.manifest),
            "eval": {**_data_entry(run.eval_store.manifest), "samples of training text": _shared_entry(run)},
        },
        "shared_text": None if run.shared.is_held_out else [run.shared.found, run.shared.compared],
        "compliance": {"summary": "not checked (mlperf.enabled=false)"},
    }  # fmt: skip


def energy_record(run: Run) -> dict[str, Any]:
    """What the nodes' devices took from run_start to run_stop, with its price where one is given; None: not known."""
    gpu, cpu = (None if joules is None else joules / JOULES_PER_KWH for joules in run.progress.joules)
    known = [each for each in (gpu, cpu) if each is not None]
    kwh = sum(known) if known else None
    sessions = "all, each before the last up to its last checkpoint" if run.progress.sessions > 1 else "all"
    found = {"gpu_kwh": gpu, "cpu_kwh": cpu, "source": run.energy.source, "sessions": sessions}
    return {**found, "kwh": kwh, **cost(kwh, run.config.run.price_per_kwh, run.config.run.gco2_per_kwh)}


def _shared_entry(run: Run) -> str:
    shared = run.shared
    return (
        f"{shared.found:,} of {shared.compared:,}, compared with {100 * shared.looked_at:.0f} % of the training store"
    )


def _data_entry(manifest: dict[str, Any]) -> dict[str, Any]:
    names = ("num_samples", "num_tokens", "mean_length", "max_length", "sha256", "text_sha256", "vocab_sha256")
    return {name: manifest.get(name) for name in names}
