"""Which rank gets which sample."""

from __future__ import annotations

from itertools import pairwise
from typing import Annotated, Literal

from pydantic import Field, model_validator

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

    @model_validator(mode="after")
    def _not_both_0(self) -> CostCoefficients:
        if self.linear == 0 and self.quadratic == 0:
            raise ValueError("balance.cost: linear and quadratic are both 0; at least one must be positive")
        return self


CostFile = Annotated[str, Field(pattern=r"\.json$", description="path of a cost.json")]


class BalanceConfig(Section):
    """Which rank gets which sample, and what a sample is taken to cost."""

    strategy: one_of(STRATEGIES) = Field("balanced", description="who gets which sample of the step (docs/balance.md)")
    num_strata: Count = Field(4, description="strata of equal width in tokens of stratified_presort")
    strata: list[Tokens] | None = Field(
        None,
        max_length=65_536,
        description="upper length bounds of the strata, ascending, the last data.max_seq_len; instead of num_strata",
    )
    strata_counts: list[NonNegativeInt] | None = Field(
        None,
        max_length=65_536,
        description="samples a rank takes from each stratum in a step; largest remainders of the true shares if unset",
    )
    cost: Literal["flops", "measure"] | CostCoefficients | CostFile = Field(
        "flops",
        description="what a sample costs, as a function of its length: flops: the model's FLOPs; measure: fitted before the "
        "clock to forward and backward of several lengths; a path: cost.json of an earlier run or of scripts/fit_cost.py; "
        "{linear: A, quadratic: B}: A per token and B per squared token, in any unit",
    )
    refine_ms: NonNegativeFloat = Field(
        20.0,
        description="balanced and balanced_free: planning time of one core, in ms for each 16,384 samples of a step, after "
        "which a plan is no longer refined; most end earlier. Counted in steps of known cost, so that all ranks agree "
        "(0: never)",
    )
    max_tokens: PositiveInt | None = Field(
        None,
        description="balanced_free: most tokens of a rank's micro-batch, so that it fits in memory; micro_batch_size x "
        "max_seq_len if unset",
    )
    num_packs: BatchSize | None = Field(
        None,
        description="packed: rows of a micro-batch, the same in every step; as many as the first steps need if unset",
    )
    max_samples_per_pack: Count = Field(12, description="packed: most samples in one row")
    pack_order: Literal["longest", "shortest"] = Field(
        "longest", description="packed: which of the open rows that a sample fits in gets it"
    )
    prefetch: Annotated[int, Field(gt=0, le=1024)] = Field(
        2, description="steps whose plan and batch are prepared in the background"
    )

    @model_validator(mode="after")
    def _settings_of_the_strategy(self) -> BalanceConfig:
        """A setting that the strategy would ignore is an error."""
        for owner, choice in STRATEGIES.items():
            for name in choice.settings:
                is_set = type(self).model_fields[name].default is None and getattr(self, name) is not None
                if is_set and self.strategy != owner:
                    raise ValueError(
                        f"balance.{name} is a setting of strategy {owner} and balance.strategy={self.strategy}; "
                        f"remove it or set balance.strategy={owner}"
                    )
        if self.strata and any(a >= b for a, b in pairwise(self.strata)):
            raise ValueError(f"balance.strata={self.strata} must ascend")
        if self.strata_counts is not None:
            count = len(self.strata) if self.strata else self.num_strata
            if len(self.strata_counts) != count:
                raise ValueError(
                    f"balance.strata_counts has {len(self.strata_counts)} numbers for {count} strata; give one a stratum"
                )
        return self
