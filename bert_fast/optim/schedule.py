"""The learning rate over steps: linear warm-up with an offset, then one of the decays in `config.choices.DECAYS`."""

from __future__ import annotations

import bisect
import math

from bert_fast.config import ScheduleConfig
from bert_fast.config.choices import DECAYS, find


def learning_rate(step: int, base_lr: float, schedule: ScheduleConfig) -> float:
    """The rate of update number `step` (from 0).

    `schedule.counting` says how updates are counted: "reference" always from 0, as MLPerf's TensorFlow reference; "nvidia"
    from 1 where start_warmup_step is not 0, one update ahead of the reference, as NVIDIA's submissions. With t = count -
    start_warmup_step below warmup_steps the rate is base_lr * t / warmup_steps. From then on the decay has it, whose progress
    goes from 0 to 1 between its first step and total_steps: from count 0 with `decay_from: start`, as MLPerf has it, or from
    the count `schedule.full_rate_until`. An offset below 0 ends the warm-up earlier than that; until then the rate is base_lr.
    """
    is_ahead = schedule.counting == "nvidia" and schedule.start_warmup_step != 0
    count = step + 1 if is_ahead else step
    since_start = count - schedule.start_warmup_step
    if since_start < schedule.warmup_steps:
        return base_lr * max(0, since_start) / max(1, schedule.warmup_steps)
    first = schedule.full_rate_until if schedule.decay_from == "warmup_end" else 0
    progress = min(1.0, max(0, count - first) / (schedule.total_steps - first))
    return float(find(DECAYS, schedule.decay)(progress, count, schedule, base_lr))


# ---- decays: (progress from 0 to 1, count of the update, schedule, base rate) -> rate ------------------------------------


def polynomial(progress: float, count: int, schedule: ScheduleConfig, base_lr: float) -> float:
    """(base_lr - end_lr) * (1 - progress) ** power + end_lr: MLPerf's."""
    return (base_lr - schedule.end_lr) * (1.0 - progress) ** schedule.power + schedule.end_lr


def cosine(progress: float, count: int, schedule: ScheduleConfig, base_lr: float) -> float:
    """Half a cosine (Loshchilov and Hutter, arXiv 1608.03983, equation 5, without restarts)."""
    return (base_lr - schedule.end_lr) * 0.5 * (1.0 + math.cos(math.pi * progress)) + schedule.end_lr


def linear_to_zero(progress: float, count: int, schedule: ScheduleConfig, base_lr: float) -> float:
    """base_lr * (1 - progress)."""
    return base_lr * (1.0 - progress)


def warmup_stable_decay(progress: float, count: int, schedule: ScheduleConfig, base_lr: float) -> float:
    """base_lr, and a line to end_lr over the last `decay_steps` before total_steps (Hu et al., arXiv 2404.06395, section 4)."""
    left = min(1.0, max(0, schedule.total_steps - count) / schedule.last_decay_steps)
    return (base_lr - schedule.end_lr) * left + schedule.end_lr


def steps(progress: float, count: int, schedule: ScheduleConfig, base_lr: float) -> float:
    """base_lr * gamma ** (milestones that the count has reached)."""
    return float(base_lr * schedule.gamma ** bisect.bisect_right(schedule.milestones, count))


def constant(progress: float, count: int, schedule: ScheduleConfig, base_lr: float) -> float:
    """base_lr."""
    return base_lr
