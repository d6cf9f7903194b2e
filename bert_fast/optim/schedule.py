"""MLPerf's learning-rate schedule: linear warm-up with an offset, then polynomial decay over absolute steps."""

from __future__ import annotations

from bert_fast.config import ScheduleConfig


def learning_rate(step: int, base_lr: float, schedule: ScheduleConfig) -> float:
    """The rate of update number `step` (from 0).

    `schedule.counting` says how updates are counted: "reference" always from 0, as MLPerf's TensorFlow reference; "nvidia"
    from 1 where start_warmup_step is not 0, one update ahead of the reference, as NVIDIA's submissions. With t = count -
    start_warmup_step below warmup_steps the rate is base_lr * t / warmup_steps; from then on
    (base_lr - end_lr) * (1 - count / total_steps) ** power + end_lr, constant after total_steps.
    """
    is_ahead = schedule.counting == "nvidia" and schedule.start_warmup_step != 0
    count = step + 1 if is_ahead else step
    since_start = count - schedule.start_warmup_step
    if since_start < schedule.warmup_steps:
        return base_lr * max(0, since_start) / max(1, schedule.warmup_steps)
    progress = min(1.0, max(0, count) / schedule.total_steps)
    return (base_lr - schedule.end_lr) * (1.0 - progress) ** schedule.power + schedule.end_lr
