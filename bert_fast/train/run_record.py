"""The end of a run: its record (metrics.json), from which the checker's verdict and the report follow."""

from __future__ import annotations

from typing import Any

from bert_fast.config import as_plain
from bert_fast.config.choices import OBJECTIVES
from bert_fast.files import write_json
from bert_fast.launch.provenance import commit
from bert_fast.model.flops import train_flops
from bert_fast.report.energy_cost import JOULES_PER_KWH, energy_cost
from bert_fast.report.schema import (
    CheckpointTimes,
    ComplianceRecord,
    CostRecord,
    DataRecord,
    EnergyRecord,
    EvaluationCurve,
    PeakMemory,
    RunMetrics,
    RunRecord,
    StoreRecord,
    TimeSplit,
)
from bert_fast.report.stragglers import text
from bert_fast.run_folder import PENDING_RECORD
from bert_fast.train.complete import complete
from bert_fast.train.context import RunContext
from bert_fast.train.environment import describe
from bert_fast.train.progress import Progress
from bert_fast.train.run import RunSummary
from bert_fast.train.setup.memory_fit import memory_at_most
from bert_fast.train.telemetry.hardware import peak_memory


def finish(context: RunContext, summary: RunSummary) -> None:
    """Make the run's record and what follows from it (train.complete). Collective until the record is made."""
    memory = peak_memory(context.environment, summary.prepared.before_mib)
    if not context.environment.is_main:
        return
    record = make_record(context, summary, PeakMemory(**memory, planned_mib=_planned_mib(context)))
    write_json(context.folder / PENDING_RECORD, record.as_json())
    if context.environment.world_size > 1:
        context.log(text(summary.loop.metrics.stragglers.worst(3), context.heartbeat.hosts))
    complete(context.folder)


def _planned_mib(context: RunContext) -> float | None:
    if OBJECTIVES[context.config.train.objective].on_pairs:  # the estimate knows the heads of pretraining alone
        return None
    return memory_at_most(context.config, context.environment.dtype).memory.total / 2**20


def make_record(context: RunContext, summary: RunSummary, memory: PeakMemory) -> RunRecord:
    """The record of a run that is done, not yet checked for compliance."""
    config, state, prepared, data = context.config, summary.state, summary.prepared, summary.data
    reached = summary.outcome.status == "success"  # or there was no target, and the run came to its last step
    evaluations = state.progress.evaluations
    eval_entry = _store_record(data.eval_store.manifest, samples_of_training_text=_shared_text(summary))
    return RunRecord(
        metrics=_metrics(context, summary),
        config=as_plain(config),
        environment={
            **describe(context.environment),
            "attention_backend": prepared.components.model.backend,
            "commit": commit(),
        },
        samples=EvaluationCurve.of(evaluations),
        status="success" if reached else "target not reached",
        target_accuracy=config.evaluation.target_accuracy,
        evaluations=evaluations,
        time_split_s=_time_split(context, summary),
        init_s=prepared.init_s,
        cost=CostRecord(linear=state.cost.linear, quadratic=state.cost.quadratic, source=state.cost_source),
        sessions=state.progress.sessions,
        peak_memory=memory,
        stragglers=summary.loop.metrics.stragglers.worst(8),
        checkpoints=[CheckpointTimes(**each) for each in prepared.writer.records],
        hosts=sorted(set(context.heartbeat.hosts)),
        energy=energy_record(context, state.progress),
        data=DataRecord(train=_store_record(data.store.manifest), eval=eval_entry),
        shared_text=None if data.shared.is_held_out else (data.shared.found, data.shared.compared),
        compliance=ComplianceRecord(summary="not checked (mlperf.enabled=false)"),
    )


def _metrics(context: RunContext, summary: RunSummary) -> RunMetrics:
    progress, prepared = summary.state.progress, summary.prepared
    training_s = summary.time_to_train_s - sum(context.clock.paused.values())
    on_pairs = OBJECTIVES[context.config.train.objective].on_pairs
    masked = 0 if on_pairs else progress.masked
    flops = train_flops(context.config.model, progress.tokens, progress.tokens_squared, masked)
    last = progress.evaluations[-1] if progress.evaluations else None
    steps_here = max(1, progress.step - summary.first_step)  # of this session: bytes are counted anew in each
    counters, peak_flops = prepared.components.engine.counters(), prepared.peak_flops
    return RunMetrics(
        time_to_train_s=summary.time_to_train_s,
        samples_to_target=progress.samples,
        target_reached=int(summary.outcome.reached),
        final_accuracy=last.accuracy if last else None,
        steps=progress.step,
        samples_per_s=progress.samples / training_s,
        tokens_per_s=progress.tokens / training_s,
        imbalance_mean=progress.mean("imbalance"),
        compute_imbalance=progress.mean("compute_imbalance"),
        data_wait_share=progress.sums.get("data_s", 0.0) / training_s,
        exposed_communication_s=progress.mean("exposed_s"),
        first_step_s=progress.first_step_s,
        mfu=flops / training_s / peak_flops if peak_flops else None,
        matmul_peak_tflops=peak_flops / 1e12,
        gradient_bytes_per_step=counters["gradient_bytes"] / steps_here,
        weight_bytes_per_step=counters["weight_bytes"] / steps_here,
        compliance_passed=None,
        retrieval_at_1=last.accuracy if last and on_pairs else None,
        retrieval_at_10=last.at_10 if last else None,
        pairs_per_s=progress.samples / training_s if on_pairs else None,
    )


def _time_split(context: RunContext, summary: RunSummary) -> TimeSplit:
    """Where the time to train went; the parts add up to it."""
    sums, paused = summary.state.progress.sums, context.clock.paused
    known = [sums.get(name, 0.0) for name in ("compute_s", "exposed_s", "straggler_s", "optimizer_s", "data_s")]
    return TimeSplit(
        forward_and_backward=known[0],
        exposed_communication=known[1],
        waiting_for_the_slowest_rank=known[2],
        optimizer=known[3],
        data_wait=known[4],
        evaluation=paused.get("evaluation"),
        checkpoint=paused.get("checkpoint"),
        other=max(0.0, summary.time_to_train_s - sum(known) - sum(paused.values())),
    )


def energy_record(context: RunContext, progress: Progress) -> EnergyRecord:
    """What the nodes' devices took from run_start to run_stop, with its price where one is given; None: not known."""
    gpu, cpu = (None if joules is None else joules / JOULES_PER_KWH for joules in progress.joules)
    known = [each for each in (gpu, cpu) if each is not None]
    kwh = sum(known) if known else None
    sessions = "all, each before the last up to its last checkpoint" if progress.sessions > 1 else "all"
    prices = energy_cost(kwh, context.config.run.price_per_kwh, context.config.run.gco2_per_kwh)
    return EnergyRecord(gpu_kwh=gpu, cpu_kwh=cpu, source=context.energy.source, sessions=sessions, **prices)


def _shared_text(summary: RunSummary) -> str:
    shared = summary.data.shared
    return (
        f"{shared.found:,} of {shared.compared:,}, compared with {100 * shared.looked_at:.0f} % of the training store"
    )


def _store_record(manifest: dict[str, Any], samples_of_training_text: str | None = None) -> StoreRecord:
    names = ("num_samples", "num_tokens", "mean_length", "max_length", "sha256", "text_sha256", "vocab_sha256")
    known = {name: manifest.get(name) for name in names}
    return StoreRecord(**known, samples_of_training_text=samples_of_training_text)
