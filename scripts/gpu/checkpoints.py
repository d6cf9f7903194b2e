"""Stage `checkpoint`: what a checkpoint beside training costs: the stall, and how much slower the steps beside it are."""

from __future__ import annotations

import statistics
import time

from bert_fast.train.checkpoint.async_writer import AsyncCheckpointWriter
from bert_fast.train.checkpoint.snapshot import rank_state, slices_to_write
from bert_fast.train.setup.build import build
from bert_fast.train.setup.warmup import synthetic_input

from .parts import config_of, environment_of
from .stage import CheckFailed, Context
from .timing import wait

_LEAST_STEPS = 5


def run(context: Context) -> None:
    result = context.result
    config = config_of(context, "base", 16)
    environment = environment_of(config)
    components = build(config, environment)
    saver = AsyncCheckpointWriter(context.scratch / "checkpoints", environment, 1, None)
    inputs = synthetic_input(config, environment, 1)

    def step() -> float:
        start = time.perf_counter()
        components.step(inputs, 1e-6, saver.before_update)
        wait(context.device)
        return time.perf_counter() - start

    def start(number: int) -> None:
        saver.start(slices_to_write(components, environment), rank_state(components, environment), {"step": number})

    for _ in range(3):
        step()
    began = time.perf_counter()
    start(1)  # pins its host memory
    saver.wait()
    first_s = time.perf_counter() - began
    plain = statistics.median(step() for _ in range(_LEAST_STEPS))
    began = time.perf_counter()
    start(2)
    saver.wait()
    alone_s = time.perf_counter() - began
    beside: list[float] = []
    start(3)
    while (saver.records[-1]["total_s"] == 0.0 and saver.failed is None) or len(beside) < _LEAST_STEPS:
        beside.append(step())
        if context.seconds_left() < 3:
            raise CheckFailed(f"the checkpoint was not written after {len(beside)} steps beside it")
    saver.wait()
    stall_s = saver.records[-1]["stall_s"]
    excess_s = sum(beside) - plain * len(beside)
    result.metrics |= {
        "checkpoint/first_s": first_s,
        "checkpoint/synchronous_s": alone_s,
        "checkpoint/stall_s": stall_s,
        "checkpoint/stall_over_synchronous": stall_s / alone_s,
        "checkpoint/slow_down_s": excess_s,
        "checkpoint/step_s": plain,
        "checkpoint/step_beside_s": statistics.median(beside),
    }
    result.summary = (
        f"stall {1e3 * stall_s:.1f} ms of {alone_s:.2f} s, steps beside it {1e3 * excess_s:,.0f} ms longer in all"
    )
