"""Which rank gets which sample."""

from __future__ import annotations

from itertools import pairwise
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationError, ValidatorFunctionWrapHandler, WrapValidator, model_validator

from bert_fast.config.choices import STRATEGIES, one_of
from bert_fast.config.section import (
    BatchSize,
    Cost,
    Count,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveInt,
    Section,
    Tokens,
)


class CostCoefficients(Section):
    """A cost model given as numbers: `linear` per token and `quadratic` per squared token, in any unit."""

    linear: Cost
    quadratic: Cost


def _one_reason(value: Any, parse: ValidatorFunctionWrapHandler) -> Any:
    """Say once what a cost can be, and not once for each of the forms it can have."""
    try:
        cost = parse(value)
    except ValidationError:
        raise ValueError(
            "must be flops, measure, the path of a .json file, or {linear: A, quadratic: B} with two numbers of which none "
            f"is negative, not {repr(value)[:100]}"
        ) from None
    if isinstance(cost, CostCoefficients) and cost.linear == cost.quadratic == 0:
        raise ValueError("linear and quadratic are both 0; set one of them to a positive number")
    return cost


CostFile = Annotated[str, Field(pattern=r"\.json$")]


class BalanceConfig(Section):
    """Which rank gets which sample, and what a sample is taken to cost. Read by the planner; docs/balance.md explains it."""

    strategy: Annotated[str, one_of(STRATEGIES)] = Field(
        "balanced", description="who gets which sample of the step (docs/balance.md)"
    )
    num_strata: Count = Field(
        4, description="strategy stratified_presort: number of strata, of equal width in tokens; strata replaces it"
    )
    strata: list[Tokens] | None = Field(
        None,
        max_length=65_536,
        description="strategy stratified_presort: longest sample of each stratum in tokens, ascending, the last of "
        "them data.max_seq_len; num_strata strata of equal width if unset",
    )
    strata_counts: list[NonNegativeInt] | None = Field(
        None,
        max_length=65_536,
        description="strategy stratified_presort: samples per rank and step from each stratum; in proportion to the "
        "samples of the strata, rounded, if unset",
    )
    cost: Annotated[Literal["flops", "measure"] | CostCoefficients | CostFile, WrapValidator(_one_reason)] = Field(
        "flops",
        description="what a sample costs, as a function of its length. flops: the FLOPs of the model; measure: a fit "
        "to the forward and backward times of several lengths, measured before the clock starts; a path: the "
        "cost.json of an earlier run or of scripts/fit_cost.py; {linear: A, quadratic: B}: A per token and B per "
        "squared token, in any unit",
    )
    refine_ms: NonNegativeFloat = Field(
        20.0,
        description="strategies balanced and balanced_free: milliseconds of one core per 16,384 samples of a step "
        "after which a plan is no longer refined; most plans are done earlier. Time is counted in operations of known "
        "cost, so that all ranks stop at the same plan. 0: do not refine",
    )
    max_tokens: PositiveInt | None = Field(
        None,
        description="strategy balanced_free: largest number of tokens of a micro-batch, so that it fits in memory; "
        "micro_batch_size x max_seq_len if unset",
    )
    num_packs: BatchSize | None = Field(
        None,
        description="strategy packed: number of rows of a micro-batch, the same in every step; as many as the first "
        "steps need if unset",
    )
    max_samples_per_pack: Count = Field(12, description="strategy packed: largest number of samples in one row")
    pack_order: Literal["longest", "shortest"] = Field(
        "longest",
        description="strategy packed: which of the rows that still have room for a sample gets it, the longest or the "
        "shortest",
    )
    prefetch: Annotated[int, Field(gt=0, le=1024)] = Field(
        2, description="number of steps whose plans and batches are prepared in the background"
    )

    @property
    def cost_path(self) -> str | None:
        """The file that holds the cost model, if a file does."""
        is_path = isinstance(self.cost, str) and self.cost not in ("flops", "measure")
        return self.cost if is_path else None  # type: ignore[return-value]

    @model_validator(mode="after")
    def _strata_ascend(self) -> BalanceConfig:
        if self.strata and any(a >= b for a, b in pairwise(self.strata)):
            raise ValueError(f"balance.strata={self.strata} must ascend; sort it and leave out what is twice in it")
        return self

    @model_validator(mode="after")
    def _one_count_per_stratum(self) -> BalanceConfig:
        if self.strata_counts is None or self.strategy != "stratified_presort":
            return self
        count = len(self.strata) if self.strata else self.num_strata
        if len(self.strata_counts) != count:
            raise ValueError(
                f"balance.strata_counts has {len(self.strata_counts)} numbers for {count} strata; set one number per stratum"
            )
        return self
