"""Made-up lines and records of runs, in the form that runs write."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from bert_fast.report.schema import (
    FORMAT,
    CheckpointTimes,
    ClipRecord,
    ComplianceRecord,
    CostRecord,
    DataRecord,
    EnergyRecord,
    EvaluationCurve,
    EvaluationLine,
    Line,
    PeakMemory,
    RunMetrics,
    RunRecord,
    StepLine,
    StoreRecord,
    Straggler,
    TimeSplit,
)
from bert_fast.run_folder import METRICS_LINES, RECORD


def step_line(step: int, every: int = 10, **changes: Any) -> StepLine:
    """The line of an interval of `every` steps on two ranks."""
    line = StepLine(
        step=step,
        samples=64 * step,
        time_s=0.1 * step,
        loss=9.0 / math.log(step + 2),
        mlm_loss=8.0,
        nsp_loss=0.7,
        lr=1e-3,
        grad_norm=0.8 + 0.1 * math.sin(step),
        samples_per_s=400.0,
        imbalance=[1.0 + 1e-5 * (i % 3) for i in range(every)],
        compute_imbalance=[1.02] * every,
        compute_ms=[120.0, 118.5],
        data_ms_rank=[1.1, 1.0],
        exposed_ms_rank=[7.3, 8.8],
        exposed_ms=7.3,
        data_ms=1.1,
        optimizer_ms=1.4,
        capped=0,
        cost=[(2872, 295882, 120.5), (2870, 295776, 118.0)],
        clip={"embeddings": ClipRecord(clipped_share=0.5, mean_coefficient=0.25 if step % 20 else 0.75)},
    )
    return replace(line, **changes)


def evaluation_line(step: int, accuracy: float) -> EvaluationLine:
    """An evaluation after `step` steps."""
    return EvaluationLine(
        step=step,
        samples=64 * step,
        time_s=0.1 * step,
        accuracy=accuracy,
        mlm_loss=4.5,
        nsp_accuracy=0.61,
        nsp_loss=0.65,
    )


def run_record(evaluations: Sequence[EvaluationLine] = (), **changes: Any) -> RunRecord:
    """The record of a run that reached its target and passed the compliance check."""
    store = StoreRecord(
        num_samples=1000,
        num_tokens=94500,
        mean_length=94.5,
        max_length=128,
        sha256="ab" * 32,
        text_sha256="cd" * 32,
        vocab_sha256=None,
    )
    record = RunRecord(
        format=FORMAT,
        metrics=RunMetrics(
            time_to_train_s=12.5,
            samples_to_target=12800,
            target_reached=1,
            final_accuracy=0.3375,
            steps=200,
            samples_per_s=1024.0,
            tokens_per_s=96000.0,
            imbalance_mean=1.00002,
            compute_imbalance=1.03,
            data_wait_share=0.01,
            exposed_communication_s=0.0073,
            first_step_s=0.4,
            mfu=0.42,
            matmul_peak_tflops=0.34,
            gradient_bytes_per_step=1e6,
            weight_bytes_per_step=0.0,
            compliance_passed=1,
        ),
        config={
            "run": {"name": "mini"},
            "train": {"seed": 7},
            "batch": {"global_batch_size": 64},
            "mlperf": {"enabled": True, "division": "open", "ruleset": "5.0.0"},
        },
        environment={"torch": "2.13.0", "device": "some CPU", "load_average": [1.0, 2.0], "commit": None},
        samples=EvaluationCurve.of(evaluations),
        status="success",
        target_accuracy=0.3325,
        evaluations=list(evaluations),
        time_split_s=TimeSplit(
            forward_and_backward=9.0,
            exposed_communication=0.0,
            waiting_for_the_slowest_rank=0.0,
            optimizer=0.0,
            data_wait=0.0,
            evaluation=2.5,
            other=1.0,
        ),
        init_s=3.0,
        cost=CostRecord(linear=2.0, quadratic=0.5, source="FLOPs of the model"),
        sessions=1,
        peak_memory=PeakMemory(host_mib=900.0, device_mib=0.0),
        stragglers=[Straggler(1, 14, 0.2, 0.6, 0.7, 0.01, -0.003, False)],
        checkpoints=[CheckpointTimes(step=100.0, stall_s=0.1, copy_s=0.2, total_s=0.3)],
        hosts=["node-1"],
        energy=EnergyRecord(
            gpu_kwh=None, cpu_kwh=0.5, source="RAPL", sessions="all", kwh=0.5, money=None, kg_co2e=None
        ),
        data=DataRecord(train=store, eval=replace(store, samples_of_training_text="5 of 900, compared with 12 %")),
        shared_text=None,
        compliance=ComplianceRecord(summary="PASSED: compliance_checker", passed=True, text="line 1 <ok> & SUCCESS"),
    )
    return replace(record, **changes)


def write_run(folder: Path, record: RunRecord, lines: Iterable[Line]) -> None:
    """Write metrics.json and metrics.jsonl."""
    (folder / RECORD).write_text(json.dumps(record.as_json()), encoding="utf-8")
    (folder / METRICS_LINES).write_text("".join(json.dumps(line.as_json()) + "\n" for line in lines), encoding="utf-8")
