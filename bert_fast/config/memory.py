"""What a rank keeps in memory, and what it computes again."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from bert_fast.config.choices import RECOMPUTE, one_of
from bert_fast.config.section import Section


class MemoryConfig(Section):
    """How a rank's memory is spent. Read by the set-up, which plans it; docs/memory.md explains it."""

    recompute: Annotated[str, one_of(RECOMPUTE, also={"none": "nothing: all that backward needs is kept"})] = Field(
        "none",
        description="what backward computes again instead of keeping it from the forward pass; losses and gradients are the "
        "same, bit for bit",
    )
    release_gradients: bool = Field(
        False,
        description="give a bucket of gradients memory when backward reaches it, and take it back after its update "
        "(optimizer.step_per_bucket) or at the next step: gradients then grow while activations shrink",
    )
    offload_activations: bool = Field(
        False,
        description="CUDA: keep what backward needs in the host's pinned memory, and bring it back when backward gets there",
    )
    offload_weights: bool = Field(
        False,
        description="CUDA, engine fsdp: keep the parts of weights, gradients and optimizer state in the host's pinned memory, "
        "where they are updated",
    )
    budget_gib: Annotated[float, Field(gt=0, le=2**20, allow_inf_nan=False)] | None = Field(
        None,
        description="GiB of a rank for weights, gradients, optimizer, communication and activations; on CUDA what torch "
        "allocates, without the driver's context. With recompute none the fastest micro-batch, accumulation, recomputation, "
        "sharding and offloading within it are chosen before the run; with recompute budget recomputation alone",
    )
