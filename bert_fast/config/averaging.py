"""Averages of the weights over steps, which are evaluated in place of the last weights."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from bert_fast.config.choices import AVERAGES, one_of
from bert_fast.config.section import PositiveInt, Probability, Section


class AveragingConfig(Section):
    """What is averaged while the run trains on with its own weights. Read by `bert_fast.optim.averaging`."""

    method: Annotated[str, one_of(AVERAGES, also={"none": "evaluate and save the weights of the last step"})] = Field(
        "none", description="which average of the weights is evaluated and saved as the final model"
    )
    decay: Probability = Field(
        0.99,
        description="exponential: share of the average that a step keeps; in the first steps (1 + n) / (10 + n) of the "
        "n-th update where that is less, so that the starting weights are soon forgotten",
    )
    keep: Annotated[int, Field(ge=2, le=1024)] = Field(
        5, description="last: number of snapshots in the mean; each takes the memory of the weights"
    )
    every_steps: PositiveInt = Field(1, description="number of steps between two updates of the average")
    start_step: Annotated[int, Field(ge=0, le=10**9)] = Field(
        0, description="number of steps before the average begins; until then the last weights are evaluated"
    )
