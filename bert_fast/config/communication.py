"""Buckets, clipping and collectives."""

from __future__ import annotations

import re
from typing import Annotated, Literal

from pydantic import Field, model_validator

from bert_fast.config.choices import CLIP_MODES, WIRE_FORMATS, one_of
from bert_fast.config.section import Mebibytes, PositiveFloat, Seconds, Section


class CommunicationConfig(Section):
    engine: Literal["bucketed", "ddp"] = Field(
        "bucketed", description="our overlapped reducer, or torch DistributedDataParallel with the same clipping"
    )
    bucket_mb: Literal["auto"] | Mebibytes | list[Mebibytes] = Field(
        25.0,
        description="bucket size in MiB of gradients; a list in ready order whose last entry repeats; or auto: measure "
        "backward and link before the clock and plan exactly",
    )
    min_bucket_mb: Annotated[float, Field(ge=0, le=2**20, allow_inf_nan=False)] = Field(
        0.0, description="auto: no bucket but the last is smaller"
    )
    max_bucket_mb: Mebibytes = Field(4096.0, description="auto: no bucket of several clip groups is larger")
    clip: one_of(CLIP_MODES) = Field("bucket_before_reduce", description="which norm is clipped")
    max_norm: PositiveFloat = Field(1.0, description="clipping threshold c; a group gets c / sqrt(number of groups)")
    clip_groups: Literal["layer", "tensor", "model"] | dict[str, str] = Field(
        "layer",
        description="parameters that share one clipping norm: one per encoder layer plus embeddings and heads; one per "
        "tensor; a single one; or {group: regular expression over parameter names}",
    )
    shard_optimizer: bool = Field(
        False,
        description="reduce-scatter gradients, update a part of the weights on each rank, gather weights during the next "
        "forward pass; optimizer state is divided by the number of ranks",
    )
    reduce_dtype: one_of(WIRE_FORMATS) = Field("fp32", description="number format on the wire")
    backend: Literal["auto", "gloo", "nccl"] = Field(
        "auto",
        description="auto: nccl on CUDA, gloo on CPU. Named, it is used by a run of one rank too: every collective is called",
    )
    timeout_s: Seconds = Field(300.0, description="seconds after which a silent rank counts as lost")

    @model_validator(mode="after")
    def _patterns_compile(self) -> CommunicationConfig:
        for group, pattern in self.clip_groups.items() if isinstance(self.clip_groups, dict) else ():
            try:
                re.compile(pattern)
            except re.error as error:
                raise ValueError(
                    f"communication.clip_groups: pattern '{pattern}' of group {group} is no regular expression: {error}"
                ) from None
        return self
