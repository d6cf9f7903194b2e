"""The held-out store, when it is evaluated, and the target."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from bert_fast.config.section import BatchSize, Samples, Section


class EvaluationConfig(Section):
    """The held-out store, how often it is evaluated, and the accuracy at which a run is done. Read by the loop."""

    data: str = Field(
        "data/pydocs-mini/eval",
        description="folder of the evaluation store, which shares no document with the training store",
    )
    num_samples: Samples | None = Field(
        None, description="evaluate the first so many samples of the store (MLPerf: 10000); all of them if unset"
    )
    sha256: str | None = Field(None, description="SHA-256 that the evaluation store must have; not compared if unset")
    batch_size: BatchSize = Field(64, description="samples per rank and forward pass in an evaluation")
    every_samples: Samples = Field(description="training samples between evaluations")
    start_samples: Samples | None = Field(
        None, description="training samples before the first evaluation; every_samples if unset"
    )
    at_start: bool = Field(
        False, description="also evaluate the starting weights, before the first step (the clock runs)"
    )
    target_accuracy: Annotated[float, Field(gt=0, lt=1, allow_inf_nan=False)] | None = Field(
        None,
        description="masked-LM accuracy at which the run is done, between 0 and 1; if unset it runs to train.max_steps",
    )
