"""How many samples a step, a rank and a forward pass take."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from bert_fast.config.section import MOST_SAMPLES_PER_RANK, BatchSize, Count, Section


class BatchConfig(Section):
    """The sizes of a batch, whose product with the number of ranks is checked. Read by the planner and the loop."""

    global_batch_size: BatchSize = Field(description="samples of one optimizer step, over all ranks")
    micro_batch_size: Annotated[int, Field(gt=0, le=MOST_SAMPLES_PER_RANK)] = Field(
        description="samples per rank and forward pass"
    )
    gradient_accumulation_steps: Annotated[int, Field(gt=0, le=4096)] = Field(
        1, description="micro-batches that every rank runs per optimizer step"
    )
    virtual_ranks: Annotated[int, Field(gt=0, le=2**17)] = Field(
        1,
        description="ranks whose shares every real rank computes, one after the other, clipped and counted as the real one "
        "would be: one machine repeats the mathematics of world_size x virtual_ranks ranks",
    )
    shape_multiple: Count = Field(
        64,
        description="pad the tokens of a micro-batch to a multiple of this number with a dummy sequence, and its "
        "masked positions to a multiple of a quarter of it, so that there are few shapes to prepare kernels for; 1: "
        "never pad",
    )

    @property
    def samples_per_rank(self) -> int:
        """Samples of one rank in one optimizer step; of one virtual rank, if there are any."""
        return self.micro_batch_size * self.gradient_accumulation_steps

    @property
    def micro_batches_per_step(self) -> int:
        """Micro-batches that a rank runs in one optimizer step, those of all its virtual ranks."""
        return self.gradient_accumulation_steps * self.virtual_ranks
