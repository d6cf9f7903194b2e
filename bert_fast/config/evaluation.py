"""The held-out store, when it is evaluated, and the target."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from bert_fast.config.section import BatchSize, Samples, Section


class EvaluationConfig(Section):
    """The held-out store, how often it is evaluated, and the accuracy at which a run is done."""

    data: str = Field("data/pydocs-mini/eval", description="folder of the held-out store; shares no document with it")
    num_samples: Samples | None = Field(
        None, description="use the first n evaluation samples (MLPerf: 10000); all of them if unset"
    )
    sha256: str | None = Field(None, description="if set, the evaluation store must have this hash")
    batch_size: BatchSize = Field(64, description="samples of one rank in one evaluation forward")
    every_samples: Samples = Field(description="samples between evaluations")
    start_samples: Samples | None = Field(
        None, description="samples before the first evaluation; every_samples if unset"
    )
    at_start: bool = Field(False, description="evaluate the starting weights on the clock, before the first step")
    target_accuracy: Annotated[float, Field(gt=0, lt=1, allow_inf_nan=False)] | None = Field(
        None, description="masked-LM accuracy at which the run is done; none: run to max_steps"
    )
