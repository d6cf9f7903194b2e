"""The charts of a run's report: from its record and its steps to figures in HTML."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import fmean

from bert_fast.report import charts
from bert_fast.report.charts import Point, Series, Share
from bert_fast.report.schema import EvaluationLine, RunRecord, StepLine, TimeSplit

# A quantity has one colour in all charts of the page.
COMPUTE, COMMUNICATION, OPTIMIZER, DATA, STRAGGLER, EVALUATION, CHECKPOINT, REST = range(8)
_SPLIT_COLOURS = {
    "forward and backward": COMPUTE,
    "exposed communication": COMMUNICATION,
    "waiting for the slowest rank": STRAGGLER,
    "optimizer": OPTIMIZER,
    "data wait": DATA,
    "evaluation": EVALUATION,
    "checkpoint": CHECKPOINT,
    "other": REST,
}


def time_split_chart(split: TimeSplit) -> str:
    """Where the time went, as one bar."""
    return charts.shares_bar(
        [Share(name, seconds, _SPLIT_COLOURS[name]) for name, seconds in split.as_json().items()], "s"
    )


def curve_charts(record: RunRecord, steps: list[StepLine]) -> list[str]:
    """Accuracy, loss, imbalance, step time, learning rate and gradient norm, each with title and caption."""
    times_s = [line.time_s for line in steps] + [line.time_s for line in record.evaluations]
    last_s = max(times_s, default=0.0)
    scale, unit = _time_unit(last_s)
    time_label = f"time since run_start ({unit})"
    return [
        _accuracy_chart(record, scale, time_label),
        _loss_chart(record, steps, scale, time_label),
        _imbalance_chart(steps),
        _step_time_chart(steps, record.global_batch_size),
        _last_step_chart(
            "Learning rate", "learning rate", Series("learning rate", [(s.step, s.lr) for s in steps], OPTIMIZER)
        ),
        _last_step_chart(
            "Gradient norm",
            "L2 norm before clipping",
            Series("gradient norm", [(s.step, s.grad_norm) for s in steps], DATA),
            robust=True,
        ),
    ]


def _accuracy_chart(record: RunRecord, scale: float, time_label: str) -> str:
    target = record.target_accuracy
    points = [(line.time_s * scale, line.accuracy) for line in record.evaluations]
    chart = charts.line_chart(
        [Series("masked-LM accuracy", points, COMPUTE)],
        time_label,
        "accuracy (share of masked tokens)",
        reference=None if target is None else (f"target {target:.4f}", target),
        from_zero=True,
    )
    return charts.figure("Held-out masked-LM accuracy", chart, _accuracy_caption(record.evaluations, target))


def _accuracy_caption(evaluations: list[EvaluationLine], target: float | None) -> str:
    if not evaluations:
        return "The run made no evaluation."
    goal = "no target was set" if target is None else f"the target is {target:.4f}"
    last = evaluations[-1]
    return f"Last: {last.accuracy:.4f} at {last.time_s:,.1f} s and {last.samples:,} samples; {goal}."


def _loss_chart(record: RunRecord, steps: list[StepLine], scale: float, time_label: str) -> str:
    held_out = [(line.time_s * scale, line.loss) for line in record.evaluations]
    series = [
        Series("training", [(line.time_s * scale, line.loss) for line in steps], COMPUTE),
        Series("evaluation", held_out, COMMUNICATION),
    ]
    has_next_sentence = record.config.get("model", {}).get("next_sentence", True)  # older runs had no such setting
    what = "masked LM + next sentence" if has_next_sentence else "masked LM"
    chart = charts.line_chart(series, time_label, f"loss (nats, {what})")
    return charts.figure("Loss", chart, "Training: mean over each log interval, dropout included.")


def _imbalance_chart(steps: list[StepLine]) -> str:
    planned: list[Point] = [
        (line.step - len(line.imbalance) + 1 + index, value)
        for line in steps
        for index, value in enumerate(line.imbalance)
    ]
    measured = [(line.step, fmean(line.compute_imbalance)) for line in steps if line.compute_imbalance]
    series = [Series("measured compute time", measured, COMMUNICATION), Series("planned cost", planned, COMPUTE)]
    return charts.figure(
        "Load imbalance between ranks",
        charts.line_chart(series, "step", "max / mean over ranks (1 is even)"),
        f"Planned, per step: {_mean_and_worst(planned)}. "
        f"Measured, means of log intervals: {_mean_and_worst(measured)}.",
    )


def _mean_and_worst(points: Sequence[Point]) -> str:
    values = [y for _, y in points]
    return f"mean {fmean(values):.5f}, worst {max(values):.5f}" if values else "not logged"


def _step_time_chart(steps: list[StepLine], global_batch_size: int) -> str:
    rows: list[Point] = []
    for line in steps:
        parts = [fmean(line.compute_ms), line.exposed_ms, line.optimizer_ms, line.data_ms]
        row = (line.step, *parts, max(0.0, 1e3 * global_batch_size / line.samples_per_s - sum(parts)))
        if all(map(math.isfinite, row)):
            rows.append(row)
    layers = [
        ("compute", COMPUTE),
        ("exposed communication", COMMUNICATION),
        ("optimizer", OPTIMIZER),
        ("data wait", DATA),
        ("rest", REST),
    ]
    caption = "Compute is the mean over ranks; the rest includes the wait for the slowest rank."
    if rows:
        means = [fmean(column) for column in list(zip(*rows, strict=True))[1:]]
        listed = ", ".join(f"{name} {mean:.2f}" for (name, _), mean in zip(layers, means, strict=True))
        caption += f" Mean over log intervals, in ms: {listed}."
    return charts.figure("Step time", charts.stacked_bars(rows, layers, "step", "ms per step"), caption)


def _last_step_chart(title: str, label: str, series: Series, robust: bool = False) -> str:
    """A value that was logged of each interval's last step."""
    chart = charts.line_chart([series], "step", label, from_zero=True, robust=robust)
    return charts.figure(title, chart, "Of each log interval's last step.")


def _time_unit(seconds: float) -> tuple[float, str]:
    """Scale and name of the unit in which a run of that length reads best."""
    if seconds > 3 * 3600:
        return 1 / 3600, "h"
    return (1 / 60, "min") if seconds > 300 else (1.0, "s")
