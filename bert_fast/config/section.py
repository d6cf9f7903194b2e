"""What all sections of a config share: a frozen pydantic model, and types of numbers with bounds."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, field_validator

# Every number has an upper bound, far above what anyone uses, so that a typing error is refused with the name of the field and
# does not hang a search or exhaust memory. `memory.estimate` finds what is within the bounds and still does not fit.
PositiveInt = Annotated[int, Field(gt=0, le=10**9)]
NonNegativeInt = Annotated[int, Field(ge=0, le=10**9)]
Count = Annotated[int, Field(gt=0, le=65_536)]  # of layers, strata, micro-batches
Width = Annotated[int, Field(gt=0, le=65_536)]
Tokens = Annotated[int, Field(gt=0, le=65_535)]  # of one sample; a store's lengths have 16 bits
Samples = Annotated[int, Field(gt=0, le=10**12)]
BatchSize = Annotated[int, Field(gt=0, le=2**18)]
Ranks = Annotated[int, Field(gt=0, le=2**17)]
Seed = Annotated[int, Field(ge=0, le=2**63 - 1)]  # of torch's generators; a time in nanoseconds fits
PositiveFloat = Annotated[float, Field(gt=0, le=1e30, allow_inf_nan=False)]
NonNegativeFloat = Annotated[float, Field(ge=0, le=1e30, allow_inf_nan=False)]
Cost = Annotated[float, Field(ge=0, le=1e30, allow_inf_nan=False)]  # in any unit
Seconds = Annotated[float, Field(gt=0, le=1e7, allow_inf_nan=False)]
Mebibytes = Annotated[float, Field(gt=0, le=2**20, allow_inf_nan=False)]
Probability = Annotated[float, Field(ge=0, lt=1, allow_inf_nan=False)]
MOST_SAMPLES_PER_RANK = 2**15  # in one step; planning more takes minutes
_LONGEST_TEXT = 4096  # characters, the longest path of Linux


class Section(BaseModel):
    """A frozen group of settings; unknown fields are errors."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=False, validate_default=True)

    @field_validator("*", mode="after")
    @classmethod
    def _text_is_text(cls, value: Any) -> Any:
        """Refuse text that no path, log or terminal can hold: null bytes, lone surrogates, megabytes."""
        texts = value if isinstance(value, (list, tuple)) else value.items() if isinstance(value, dict) else (value,)
        for text in (part for each in texts for part in (each if isinstance(each, tuple) else (each,))):
            if not isinstance(text, str):
                continue
            if len(text) > _LONGEST_TEXT:
                raise ValueError(f"a text of {len(text):,} characters is longer than {_LONGEST_TEXT:,}")
            odd = [c for c in text if (ord(c) < 32 and c not in "\n\t") or ord(c) == 127 or 0xD800 <= ord(c) <= 0xDFFF]
            if odd:
                raise ValueError(f"a text holds the character {odd[0]!a}, which cannot be used here")
        return value
