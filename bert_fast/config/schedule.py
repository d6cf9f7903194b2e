"""The learning rate over steps."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from bert_fast.config.section import NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, Section


class ScheduleConfig(Section):
    """MLPerf's schedule: linear warm-up with an offset, then polynomial decay over absolute steps."""

    warmup_steps: NonNegativeInt = Field(0, description="steps of linear warm-up")
    start_warmup_step: Annotated[int, Field(ge=-(10**9), le=10**9)] = Field(
        0, description="step at which warm-up starts; negative starts it part-way up"
    )
    counting: Literal["nvidia", "reference"] = Field(
        "nvidia",
        description="number of the first update. nvidia: 0, but 1 where start_warmup_step is not 0, as in NVIDIA's submissions "
        "and those made from them; reference: always 0, as in MLPerf's TensorFlow reference",
    )
    total_steps: PositiveInt = Field(description="step at which the decay ends (opt_learning_rate_training_steps)")
    end_lr: NonNegativeFloat = Field(0.0, description="learning rate at and after total_steps")
    power: PositiveFloat = Field(1.0, description="power of the polynomial decay")
