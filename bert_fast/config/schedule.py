"""The learning rate over steps."""

from __future__ import annotations

import itertools
from typing import Annotated, Literal

from pydantic import Field, field_validator

from bert_fast.config.choices import DECAYS, one_of
from bert_fast.config.section import NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, Section


class ScheduleConfig(Section):
    """Linear warm-up with an offset, then a decay; the defaults are MLPerf's schedule, a polynomial over absolute steps.

    Read by `bert_fast.optim.schedule`.
    """

    warmup_steps: NonNegativeInt = Field(0, description="number of steps of linear warm-up")
    start_warmup_step: Annotated[int, Field(ge=-(10**9), le=10**9)] = Field(
        0,
        description="step at which the warm-up starts; with a negative number the first step is already part of the "
        "way up",
    )
    counting: Literal["nvidia", "reference"] = Field(
        "nvidia",
        description="which number the first update has. nvidia: 1 where start_warmup_step is not 0, and else 0, as in "
        "NVIDIA's submissions and those made from them; reference: always 0, as in MLPerf's TensorFlow reference",
    )
    total_steps: PositiveInt = Field(
        description="step at which the decay ends (MLPerf: opt_learning_rate_training_steps)"
    )
    decay: Annotated[str, one_of(DECAYS)] = Field("polynomial", description="how the rate falls after the warm-up")
    decay_from: Literal["start", "warmup_end"] = Field(
        "start",
        description="step at which the decay begins, at the full rate. start: step 0, so that the rate is lower already when "
        "the warm-up ends (MLPerf's); warmup_end: step warmup_steps, up to which the full rate is kept",
    )
    end_lr: NonNegativeFloat = Field(0.0, description="learning rate from step total_steps on")
    power: PositiveFloat = Field(1.0, description="power of the polynomial decay")
    decay_steps: PositiveInt | None = Field(
        None, description="warmup_stable_decay: number of steps of the fall at the end; a tenth of total_steps if unset"
    )
    milestones: list[PositiveInt] = Field([], max_length=10_000, description="steps: where the rate falls, in order")
    gamma: Annotated[float, Field(gt=0, lt=1, allow_inf_nan=False)] = Field(
        0.1, description="steps: factor of the rate at each milestone"
    )

    @field_validator("milestones")
    @classmethod
    def _milestones_ascend(cls, steps: list[int]) -> list[int]:
        if any(a >= b for a, b in itertools.pairwise(steps)):
            raise ValueError("schedule.milestones must ascend; sort them and name each step once")
        return steps

    @property
    def full_rate_until(self) -> int:
        """The count of updates from which `decay_from: warmup_end` decays: an offset above 0 makes the warm-up end later."""
        return self.warmup_steps + max(0, self.start_warmup_step)

    @property
    def last_decay_steps(self) -> int:
        """The length of the decay of `warmup_stable_decay`."""
        return self.decay_steps or max(1, self.total_steps // 10)
