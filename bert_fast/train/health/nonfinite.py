"""Steps that are not finite: skipped, counted without asking the device, blamed on a rank and its samples."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from bert_fast.balance.planner import Planner
from bert_fast.train.collectives import gather_floats
from bert_fast.train.environment import Environment
from bert_fast.train.step import StepResult

_SHOWN = 64  # samples that a message names


@dataclass(frozen=True)
class Skipped:
    """Skipped steps: `in_a_row` up to now; `ranks` are those whose own loss was not finite, the first of them at `step`.

    `text` is a line for the log; `fatal` says why the run must stop, if it must.
    """

    text: str
    step: int
    ranks: list[int]
    in_a_row: int
    fatal: str | None


class NonfiniteWatch:
    """Counts skipped steps of one run on the device."""

    def __init__(self, environment: Environment, limit: int) -> None:
        """`limit`: how many steps in a row may be skipped (`train.max_skipped_steps`)."""
        self._environment, self._limit = environment, limit
        self._in_a_row = torch.zeros((), device=environment.device)
        self._first_bad = torch.full((), -1.0, device=environment.device)  # step at which this rank's own loss was not

    @property
    def skips_now(self) -> bool:
        """Whether the last step was skipped. Waits for the device."""
        return float(self._in_a_row) > 0

    def add(self, step: int, result: StepResult) -> None:
        """Count a step."""
        self._in_a_row = torch.where(result.is_finite, 0.0, self._in_a_row + 1)
        first = ~result.local_is_finite & (self._first_bad < 0)
        self._first_bad = torch.where(first, float(step), self._first_bad)

    def forget_blame(self) -> None:
        """Begin a new interval: a loss that was not finite before it no longer counts."""
        self._first_bad.fill_(-1.0)

    def check(self, last_step: int, hosts: Sequence[str], planner: Planner) -> Skipped | None:
        """Who is to blame, if the last step was skipped; None if it was not. A collective where it was."""
        in_a_row = int(self._in_a_row.item())
        if in_a_row == 0:
            return None
        steps = gather_floats([float(self._first_bad.item())], self._environment.device)[:, 0]
        ranks = [rank for rank, step in enumerate(steps) if step >= 0]
        step = int(steps[ranks[0]]) if ranks else last_step
        where = ", ".join(sorted({hosts[rank % len(hosts)] for rank in ranks}))
        blame = (
            f"rank {', '.join(map(str, ranks))} on {where}"
            if ranks
            else "no single rank's loss (the gradient overflowed)"
        )
        text = f"step {step}: loss or gradient is not finite, from {blame}"
        fatal = None
        if in_a_row > self._limit:
            samples = planner.plan(step).of_rank(ranks[0] if ranks else 0).tolist()
            more = f" and {len(samples) - _SHOWN:,} more" if len(samples) > _SHOWN else ""
            fatal = (
                f"{text}; {in_a_row} steps in a row were skipped (train.max_skipped_steps={self._limit}). Samples of that "
                f"rank: {samples[:_SHOWN]}{more}. Lower optimizer.lr, lengthen schedule.warmup_steps, or look at these samples"
            )
        return Skipped(text, step, ranks, in_a_row, fatal)
