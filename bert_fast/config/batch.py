"""How many samples a step, a rank and a forward pass take."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from bert_fast.config.section import MOST_SAMPLES_PER_RANK, BatchSize, Count, Section


class BatchConfig(Section):
    global_batch_size: BatchSize = Field(description="samples in one optimizer step over all ranks")
    micro_batch_size: Annotated[int, Field(gt=0, le=MOST_SAMPLES_PER_RANK)] = Field(
        description="samples of one rank in one forward pass"
    )
    gradient_accumulation_steps: Annotated[int, Field(gt=0, le=4096)] = Field(
        1, description="micro-batches a rank runs before one optimizer step"
    )
    shape_multiple: Count = Field(
        64,
        description="pad a micro-batch's tokens to a multiple of this with a dummy sequence, and its masked positions to a "
        "quarter of it: kernels are prepared once a shape (1: never pad)",
    )
