"""The learning rate over steps."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from bert_fast.config.section import NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, Section


class ScheduleConfig(Section):
    """MLPerf's schedule: linear warm-up with an offset, then polynomial decay over absolute steps.

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
    end_lr: NonNegativeFloat = Field(0.0, description="learning rate from step total_steps on")
    power: PositiveFloat = Field(1.0, description="power of the polynomial decay")
