"""The loop: seeds, precision, steps."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from bert_fast.config.choices import OBJECTIVES, one_of
from bert_fast.config.section import NonNegativeInt, PositiveInt, Section, Seed


class TrainConfig(Section):
    seed: Seed = Field(0, description="seeds weights, dropout and the order of samples")
    objective: Annotated[str, one_of(OBJECTIVES)] = Field("mlm_nsp", description="what is minimised")
    precision: Literal["auto", "fp32", "bf16", "fp16", "fp8"] = Field(
        "auto",
        description="autocast format; auto: bf16 where the hardware has it, else fp32; fp8: bf16 with the encoder's matmuls in "
        "FP8 (Transformer Engine)",
    )
    compile: bool = Field(False, description="torch.compile each encoder layer in warm-up, before the clock")
    cuda_graphs: bool = Field(
        False,
        description="CUDA: capture the whole step, one graph a batch shape (use packed rows or a large shape_multiple)",
    )
    max_steps: PositiveInt = Field(description="stop after so many steps even if the target was not reached")
    warmup_batches: Annotated[int, Field(ge=0, le=10_000)] = Field(
        3, description="synthetic steps before the clock (communicator, kernels, compile); weights are restored"
    )
    log_every_steps: PositiveInt = Field(10, description="steps between log lines, and between checks for signals")
    max_skipped_steps: NonNegativeInt = Field(
        3, description="consecutive non-finite steps that are skipped before the run stops"
    )
    loss_scale: Annotated[float, Field(gt=0, le=2**40, allow_inf_nan=False)] = Field(
        65536.0, description="first loss scale of fp16"
    )
    deterministic: bool = Field(False, description="torch.use_deterministic_algorithms")
