"""The update rule."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field, model_validator

from bert_fast.config.choices import OPTIMIZERS, one_of
from bert_fast.config.section import NonNegativeFloat, PositiveFloat, Probability, Section


class OptimizerConfig(Section):
    """The update rule and its constants. Read by `bert_fast.optim.build`, and by the engine for `step_per_bucket`."""

    name: Annotated[str, one_of(OPTIMIZERS)] = Field("adamw", description="which update rule")
    lr: PositiveFloat = Field(1e-4, description="learning rate at the end of the warm-up, from which it decays")
    beta1: Probability = Field(0.9, description="decay of the first moment per step")
    beta2: Probability = Field(0.999, description="decay of the second moment per step")
    eps: PositiveFloat = Field(1e-6, description="number that is added to the denominator of an update")
    weight_decay: NonNegativeFloat = Field(0.01, description="decoupled weight decay; biases and LayerNorm never decay")
    step_per_bucket: bool = Field(
        False,
        description="update the weights of each bucket as soon as it is reduced, while later ones are on the wire; "
        "false: update all at the end. The weights are the same. true needs engine bucketed, and clip none or "
        "bucket_before_reduce",
    )
    use_apex: bool = Field(False, description="adamw: use apex's FusedAdam; the run stops if apex is not installed")

    @model_validator(mode="after")
    def _apex_has_no_reference_lamb(self) -> OptimizerConfig:
        if self.use_apex and self.name == "lamb":
            raise ValueError(
                "optimizer.use_apex=true with optimizer.name=lamb: apex's LAMB takes one trust ratio for query, key and value "
                "together, and no ratio where weight_decay is 0, while MLPerf's reference always has one for each; set "
                "optimizer.use_apex=false"
            )
        return self
