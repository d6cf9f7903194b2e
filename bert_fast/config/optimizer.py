"""The update rule."""

from __future__ import annotations

import math
from typing import Annotated, Any, Literal

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
    weight_decay: NonNegativeFloat = Field(
        0.01,
        description="weight decay (adam: L2, in the gradient; all others: decoupled); biases and LayerNorm never decay",
    )
    step_per_bucket: bool = Field(
        False,
        description="update the weights of each bucket as soon as it is reduced, while later ones are on the wire; "
        "false: update all at the end. The weights are the same. true needs engine bucketed, and clip none or "
        "bucket_before_reduce",
    )
    use_apex: bool = Field(
        False, description="adamw, adam: use apex's FusedAdam; the run stops if apex is not installed"
    )
    state_dtype: Literal["fp32", "bf16", "int8", "int4"] = Field(
        "fp32",
        description="adamw: format in which its moments are kept between steps; in int8 and int4 128 numbers share a scale",
    )
    state_on_host: bool = Field(
        False,
        description="adamw, on CUDA: keep its moments in the host's memory, and bring them over piece by piece in a step",
    )
    trust: Literal["tensor", "group", "global"] = Field(
        "tensor",
        description="lamb: what has one trust ratio. tensor: each tensor of MLPerf's reference; group: all of an encoder "
        "layer, of the embeddings or of the heads; global: the whole model",
    )
    momentum: Probability | None = Field(
        None,
        description="muon: decay of the momentum of its matrices per step, 0.95 if unset; mfac, ggt: decay of the average of "
        "their updates, none if unset",
    )
    nesterov: bool = Field(True, description="muon: look one step of the momentum ahead")
    newton_schulz_steps: Annotated[int, Field(ge=1, le=100)] = Field(
        5, description="muon: iterations that orthogonalize a matrix's update"
    )
    newton_schulz_dtype: Literal["auto", "bf16", "fp32", "fp64"] = Field(
        "auto", description="muon: format of those iterations. auto: bf16 where the hardware has it, and else fp32"
    )
    adjust_lr: Literal["match_rms_adamw", "original"] = Field(
        "match_rms_adamw",
        description="muon: factor of the rate for an A x B matrix. match_rms_adamw: 0.2 sqrt(max(A, B)), so that AdamW's "
        "rate and weight decay serve; original: sqrt(max(1, A / B))",
    )
    muon_lr: PositiveFloat | None = Field(
        None, description="muon: learning rate of its matrices, which follows the schedule too; lr if unset"
    )
    factor_min: PositiveFloat = Field(0.5, description="onebit_lamb: least factor of a frozen trust ratio, at most 1")
    factor_max: PositiveFloat = Field(
        4.0,
        description="onebit_lamb: largest factor of a frozen trust ratio, at least 1; with both bounds 1 it stays frozen",
    )
    class_name: str | None = Field(
        None,
        description="pytorch_optimizer: name of the class, such as SOAP, Lion or Shampoo, in any case; torchao: AdamW8bit, "
        "AdamW4bit or AdamWFp8",
    )
    arguments: dict[str, Any] = Field(
        {},
        description="pytorch_optimizer: arguments of the class beside lr and weight_decay, such as {betas: [0.9, 0.95]}",
    )
    window: Annotated[int, Field(ge=1, le=2**16)] | None = Field(
        None,
        description="mfac, ggt, micro_adam: how many of the last gradients they keep; unset: 128, and 10 for micro_adam",
    )
    density: Annotated[float, Field(ge=2**-15, le=1)] = Field(
        0.01, description="mfac_sparse, ggt_sparse, micro_adam: share of a block of gradients that is kept, the largest"
    )
    block: Annotated[int, Field(ge=2, le=2**15)] | None = Field(
        None,
        description="mfac_sparse, ggt_sparse, micro_adam: numbers of a block, of which density x block are kept, rounded up; "
        "at most 32,768, as places have 16 bits; unset: 1 / density, of which one is kept, the fastest to find",
    )
    rank: Annotated[int, Field(ge=1, le=4096)] = Field(
        4,
        description="mfac_lowrank: rank that a gradient matrix is cut to; one that has no smaller factors is kept whole",
    )
    damping: PositiveFloat = Field(1e-6, description="mfac: what is added to the diagonal of the Fisher matrix")
    precondition: Literal["layer", "model"] = Field(
        "layer",
        description="mfac, ggt, micro_adam: what has a window of its own. layer: an encoder layer, the embeddings, the heads; "
        "model: all of it",
    )
    error_feedback: bool = Field(
        True,
        description="mfac_sparse, mfac_lowrank, ggt_sparse, micro_adam: keep what is left out of a gradient, and add it to "
        "the next",
    )
    residual_dtype: Literal["fp32", "bf16", "int4"] | None = Field(
        None, description="format of what error feedback keeps; unset: bf16, and int4 for micro_adam"
    )

    @model_validator(mode="after")
    def _a_block_has_a_number_to_keep(self) -> OptimizerConfig:
        if self.block is not None and self.block * self.density < 1:
            raise ValueError(
                f"optimizer.density={self.density} of optimizer.block={self.block} is less than one number, and one is kept of "
                f"each block; set block to at least {math.ceil(1 / self.density)}, or leave it unset"
            )
        return self

    @model_validator(mode="after")
    def _bounds_of_the_factor_are_around_one(self) -> OptimizerConfig:
        if not self.factor_min <= 1 <= self.factor_max:
            raise ValueError(
                f"optimizer.factor_min={self.factor_min} and factor_max={self.factor_max} must have 1 between them, at which "
                "the factor begins; set factor_min to at most 1 and factor_max to at least 1"
            )
        return self

    @property
    def numbers_per_block(self) -> int:
        """`block`, or what it is if unset."""
        return self.block or max(2, math.floor(1 / self.density + 1e-9))  # rounded up, two would be kept of each
