"""Buckets, clipping and collectives."""

from __future__ import annotations

import re
from typing import Annotated, Literal

from pydantic import Field, model_validator

from bert_fast.config.choices import CLIP_MODES, ENGINES, WIRE_FORMATS, one_of
from bert_fast.config.section import Mebibytes, PositiveFloat, Seconds, Section


class CommunicationConfig(Section):
    """How gradients are clipped and reduced. Read by the set-up, which builds the engine; docs/communication.md explains it."""

    engine: Annotated[str, one_of(ENGINES)] = Field("bucketed", description="what averages gradients over ranks")
    bucket_mb: Literal["auto"] | Mebibytes | list[Mebibytes] = Field(
        25.0,
        description="size of a bucket in MiB of gradients; a list of sizes in the order in which gradients become "
        "ready, the last of which repeats; or auto: measure the backward pass and the network before the clock "
        "starts, and plan the best buckets for them",
    )
    min_bucket_mb: Annotated[float, Field(ge=0, le=2**20, allow_inf_nan=False)] = Field(
        0.0, description="bucket_mb auto: smallest size of a bucket in MiB; only the last bucket may be smaller"
    )
    max_bucket_mb: Mebibytes = Field(
        4096.0, description="bucket_mb auto: largest size in MiB of a bucket that holds several clip groups"
    )
    clip: Annotated[str, one_of(CLIP_MODES)] = Field("bucket_before_reduce", description="which norm is clipped")
    max_norm: PositiveFloat = Field(
        1.0,
        description="largest norm of a clipped gradient; each clip group may have max_norm / sqrt(number of groups)",
    )
    clip_groups: Literal["layer", "tensor", "model"] | dict[str, str] = Field(
        "layer",
        description="clip bucket_before_reduce: the parameters that share one norm. layer: one group per encoder "
        "layer, and the embeddings and heads; tensor: one group per tensor; model: one group; or a mapping {group: "
        "regular expression over parameter names}",
    )
    shard_optimizer: bool = Field(
        False,
        description="reduce-scatter the gradients, update a part of the weights on each rank, and gather the weights "
        "during the next forward pass; each rank then holds only its part of the optimizer state",
    )
    reshard_after_forward: bool = Field(
        True,
        description="fsdp: let go of a layer's weights after its forward pass and gather them again for backward (ZeRO-3); "
        "false: keep them until backward has passed (ZeRO-2)",
    )
    shard_within_node: bool = Field(
        False,
        description="fsdp: divide weights, gradients and optimizer state over the ranks of a node, of which every node has a "
        "copy, and not over all ranks",
    )
    reduce_dtype: Annotated[str, one_of(WIRE_FORMATS)] = Field("fp32", description="number format on the wire")
    residual_dtype: Literal["fp32", "bf16", "int4"] = Field(
        "fp32", description="format of what error feedback keeps; there are two copies, as a step may be skipped"
    )
    density: Annotated[float, Field(ge=2**-12, le=1)] = Field(
        0.01, description="share of each 4,096 numbers that topk_ef sends, rounded up to whole ones"
    )
    powersgd_rank: Annotated[int, Field(ge=1, le=4096)] = Field(
        4,
        description="powersgd: columns of the thin matrices; a matrix that has no more numbers than these is sent whole",
    )
    exact_steps: Annotated[int, Field(ge=0)] = Field(
        0,
        description="powersgd, onebit: steps in fp32 before the first that is compressed; zero_one: steps after which the "
        "second moment is frozen; local steps begin local_step_scaler steps later",
    )
    var_update_scaler: Annotated[int, Field(ge=1)] = Field(
        16, description="zero_one: updates of the second moment after which the number of steps between them doubles"
    )
    local_step_scaler: Annotated[int, Field(ge=1)] = Field(
        1000, description="zero_one: steps after which the number of steps from exchange to exchange doubles"
    )
    local_step_clipper: Annotated[int, Field(ge=1)] = Field(
        16, description="zero_one: the most steps from exchange to exchange; 1: no local steps"
    )
    backend: Literal["auto", "gloo", "nccl"] = Field(
        "auto",
        description="auto: nccl on CUDA, gloo on the CPU. A run of one rank calls no collectives with auto, and all "
        "of them with a named backend",
    )
    timeout_s: Seconds = Field(300.0, description="seconds after which a rank that does not answer counts as lost")

    @model_validator(mode="after")
    def _patterns_compile(self) -> CommunicationConfig:
        for group, pattern in self.clip_groups.items() if isinstance(self.clip_groups, dict) else ():
            try:
                re.compile(pattern)
            except re.error as error:
                raise ValueError(
                    f"communication.clip_groups: the pattern '{pattern}' of group {group} is not a regular expression "
                    f"({error}); correct it"
                ) from None
        return self
