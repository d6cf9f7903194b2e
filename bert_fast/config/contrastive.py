"""The contrastive objective: what is compared with what."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from bert_fast.config.section import Count, PositiveFloat, Section

Margin = Annotated[float, Field(ge=0, le=10, allow_inf_nan=False)]
Scale = Annotated[float, Field(gt=0, le=1e4, allow_inf_nan=False)]


class ContrastiveConfig(Section):
    """Training of embeddings on pairs of texts (`train.objective: contrastive`). docs/contrastive.md explains it."""

    pooling: Literal["cls", "mean"] = Field(
        "mean", description="a text's embedding: the state of its first token, or the mean over its tokens; normalized"
    )
    negatives: Annotated[int, Field(ge=0, le=1024)] = Field(
        0, description="hard negatives of each pair; as many as the stores have"
    )
    scale: Scale = Field(20.0, description="factor of cosines in the softmax (1 / temperature), at the start")
    learn_scale: bool = Field(False, description="train the logarithm of the scale with the encoder")
    max_scale: Scale = Field(100.0, description="bound of a learned scale")
    symmetric: bool = Field(True, description="each key also chooses its query, at half the weight")
    query_query: bool = Field(False, description="other queries are negatives of a query as well")
    key_key: bool = Field(False, description="other pairs' positives are negatives of a positive as well")
    margin: Margin | None = Field(
        None,
        description="leave out negatives whose cosine is above that of the pair by more than this: they are likely to be "
        "positives that nobody has marked; none are left out if unset",
    )
    widths: tuple[Count, ...] = Field(
        (),
        description="Matryoshka: train the first so many numbers of an embedding for each of these; [] trains all alone",
    )
    width_weights: tuple[PositiveFloat, ...] = Field((), description="of widths in the loss; [] weighs all alike")
    loss_precision: Literal["fp32", "bf16"] = Field(
        "fp32", description="of the embeddings in matrix products of the loss; its sums are fp32"
    )
    tile: tuple[Count, Count] | None = Field(
        None, description="rows and columns of a tile of scores; measured once where a rank has many pairs, if unset"
    )
    ring_by_node: bool = Field(
        False, description="exchange blocks of keys among the ranks of a node first (system.ranks_per_node)"
    )
