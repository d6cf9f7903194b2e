"""The training store and how it is read."""

from __future__ import annotations

from pydantic import Field

from bert_fast.config.section import NonNegativeFloat, Section, Tokens


class DataConfig(Section):
    train: str = Field("data/pydocs-mini/train", description="folder of the training store (scripts/prepare_data.py)")
    max_seq_len: Tokens = Field(512, description="longest sample in tokens; a longer one in a store is refused")
    vocab_sha256: str | None = Field(None, description="if set, the stores must have been made with this vocabulary")
    dynamic_masking: bool = Field(
        False,
        description="predict other tokens of a sample each time it is used, not those chosen offline (open division)",
    )
    allow_shared_text: bool = Field(
        False,
        description="evaluate although the evaluation store is of text that the training store has, and name it in the log and "
        "the report; else such a run is refused before it starts",
    )
    scrub_mb_per_s: NonNegativeFloat = Field(
        8.0,
        description="MB a second that every rank reads of the training store in the background, to notice that it has "
        "changed; 0: never",
    )
