"""The training store and how it is read."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from bert_fast.config.section import NonNegativeFloat, Section, Tokens


class DataConfig(Section):
    """The training store. Read when the clock has started: a run touches no data before."""

    train: str = Field(
        "data/pydocs-mini/train", description="folder of the training store; scripts/prepare_data.py makes one"
    )
    max_seq_len: Tokens = Field(
        512, description="length of the longest sample in tokens; a store with a longer one is refused"
    )
    vocab_sha256: str | None = Field(
        None, description="SHA-256 of the vocabulary that the stores must have been made with; not compared if unset"
    )
    mask_fraction: Annotated[float, Field(gt=0, lt=1, allow_inf_nan=False)] | None = Field(
        None,
        description="share of a sample's tokens that are predicted. Another than the store was made with needs "
        "dynamic_masking=true; the store's if unset",
    )
    dynamic_masking: bool = Field(
        False,
        description="choose the tokens to predict anew each time a sample is used; false: those that were chosen when "
        "the store was made (the closed division needs that)",
    )
    allow_shared_text: bool = Field(
        False,
        description="evaluate even if the training store holds text of the evaluation store, and say so in the log "
        "and the report; false: refuse such a run before its first step",
    )
    scrub_mb_per_s: NonNegativeFloat = Field(
        8.0,
        description="MB per second that every rank reads of the training store in the background, to notice that its "
        "files have changed; 0: never",
    )

    @property
    def drawn_fraction(self) -> float | None:
        """The share of a sample's tokens that is chosen anew in each use; None: each keeps its number of masks."""
        return self.mask_fraction if self.dynamic_masking else None

    @property
    def mask_share(self) -> float:
        """The share of masked tokens in estimates and made-up batches: `mask_fraction`, or BERT's 15 %."""
        return 0.15 if self.mask_fraction is None else self.mask_fraction
