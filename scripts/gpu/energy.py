"""Stage `energy`: joules per 1,000 sequences of BERT-large's step, as far as NVML and RAPL can be read."""

from __future__ import annotations

import time

from benchmarks.step.variants import ours
from bert_fast.train.telemetry.energy_meter import EnergyMeter

from .parts import arguments, precision_of
from .stage import Context, NotAvailable
from .timing import wait

_SECONDS = 4.0


def run(context: Context) -> None:
    result = context.result
    args = arguments(context, "large", 56)
    step = ours(args, precision_of(context))
    for _ in range(2):
        step()
    wait(context.device)
    meter = EnergyMeter()
    meter.start()
    start, count = time.perf_counter(), 0
    while time.perf_counter() - start < (0.1 if context.tiny else _SECONDS):
        step()
        wait(context.device)
        count += args.batch
    seconds, reading = time.perf_counter() - start, meter.stop()
    result.details["source"] = reading.source
    parts = {"gpu": reading.joules_gpu, "cpu": reading.joules_cpu}
    for name, joules in parts.items():
        if joules is not None:
            result.metrics[f"energy_j_per_1000/{name}"] = 1e3 * joules / count
            result.metrics[f"power_w/{name}"] = joules / seconds
    if reading.joules_gpu is None and (reading.joules_cpu is None or not context.tiny):
        raise NotAvailable(f"counted: {reading.source}")
    shown = [f"{name} {1e3 * joules / count:,.0f} J" for name, joules in parts.items() if joules is not None]
    result.summary = f"per 1,000 sequences: {', '.join(shown)}"
