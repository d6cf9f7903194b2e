"""The loop: seeds, precision, steps."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from bert_fast.config.choices import OBJECTIVES, one_of
from bert_fast.config.section import NonNegativeInt, PositiveInt, Section, Seed


class TrainConfig(Section):
    """How the loop trains: seeds, precision, number of steps. Read by the set-up and the loop."""

    seed: Seed = Field(0, description="seed of the starting weights, of dropout and of the order of samples")
    objective: Annotated[str, one_of(OBJECTIVES)] = Field("mlm_nsp", description="what is minimised")
    precision: Literal["auto", "fp32", "bf16", "fp16", "fp8"] = Field(
        "auto",
        description="number format of autocast. auto: bf16 where the hardware has it, and else fp32; fp8: bf16, with "
        "the encoder's matrix products in FP8 (Transformer Engine)",
    )
    compile: bool = Field(False, description="compile each encoder layer with torch.compile, before the clock starts")
    cuda_graphs: bool = Field(
        False,
        description="CUDA: capture the whole step as one graph per batch shape (use packed rows or a large "
        "batch.shape_multiple)",
    )
    max_steps: PositiveInt = Field(
        description="number of steps after which the run ends even if the target was not reached"
    )
    warmup_batches: Annotated[int, Field(ge=0, le=10_000)] = Field(
        3,
        description="number of steps on made-up samples before the clock starts, to prepare communicators and "
        "kernels; the weights are put back afterwards. Engine ddp runs at least 2",
    )
    log_every_steps: PositiveInt = Field(
        10, description="number of steps between lines of the log, and between checks for signals"
    )
    max_skipped_steps: NonNegativeInt = Field(
        3,
        description="number of steps in a row with a gradient that is not finite, which are skipped; after more of "
        "them the run stops",
    )
    loss_scale: Annotated[float, Field(gt=0, le=2**40, allow_inf_nan=False)] = Field(
        65536.0, description="precision fp16: loss scale of the first step"
    )
    deterministic: bool = Field(
        False, description="use deterministic algorithms only (torch.use_deterministic_algorithms)"
    )
