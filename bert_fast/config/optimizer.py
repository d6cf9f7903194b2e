"""The update rule."""

from __future__ import annotations

from pydantic import Field, model_validator

from bert_fast.config.choices import OPTIMIZERS, one_of
from bert_fast.config.section import NonNegativeFloat, PositiveFloat, Probability, Section


class OptimizerConfig(Section):
    name: one_of(OPTIMIZERS) = Field("adamw", description="which update rule")
    lr: PositiveFloat = Field(1e-4, description="base learning rate")
    beta1: Probability = Field(0.9, description="decay of the first moment")
    beta2: Probability = Field(0.999, description="decay of the second moment")
    eps: PositiveFloat = Field(1e-6, description="epsilon in the denominator")
    weight_decay: NonNegativeFloat = Field(0.01, description="decoupled decay; never on biases and LayerNorm")
    step_per_bucket: bool = Field(
        False,
        description="update each bucket's weights as soon as it is reduced, while later ones are on the wire; false: all at "
        "the end; the weights are the same. Needs engine bucketed and clip none or bucket_before_reduce",
    )
    use_apex: bool = Field(False, description="adamw: use apex's fused form; stops if apex is not installed")

    @model_validator(mode="after")
    def _apex_has_no_reference_lamb(self) -> OptimizerConfig:
        if self.use_apex and self.name == "lamb":
            raise ValueError(
                "optimizer.use_apex=true with optimizer.name=lamb: apex's LAMB takes one trust ratio for query, key and value "
                "together, and none where weight_decay is 0; MLPerf's reference has one each, always. Set "
                "optimizer.use_apex=false"
            )
        return self
