"""A recipe file of scripts/prepare_data.py: every option of the command as a typed field with bounds."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, model_validator

from bert_fast.config import Section
from bert_fast.config.choices import CORPORA, one_of
from bert_fast.config.section import Seed, Tokens
from bert_fast.config.yaml_files import read_yaml, validate
from bert_fast.data.corpora.base import AUTO
from bert_fast.data.corpus import PYDOCS_PACKAGES
from bert_fast.errors import UserError

Share = Annotated[float, Field(gt=0, lt=1, allow_inf_nan=False)]
Text = Annotated[str, Field(min_length=1)]
Package = Annotated[str, Field(pattern=r"^[A-Za-z_][A-Za-z0-9_]*(\.[A-Za-z_][A-Za-z0-9_]*)*$")]


class RecipeFile(Section):
    """The fields of a recipe, named as the command's flags with underscores; `--help` explains them."""

    corpus: Annotated[str, one_of(CORPORA)] = "pydocs"
    input: Text | None = None
    column: Text = "text"
    packages: list[Package] = Field(list(PYDOCS_PACKAGES), min_length=1, max_length=1000)
    out: Text = "data/pydocs"
    vocab: Text | None = None
    vocab_size: Annotated[int, Field(ge=100, le=65_536)] = 2048  # the store's ids have 16 bits
    max_seq_len: Annotated[Tokens, Field(ge=5)] = 512
    max_predictions: Tokens = 76
    mask_prob: Share = 0.15
    short_seq_prob: Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)] = 0.1
    dupe_factor: Annotated[int, Field(ge=1, le=10_000)] = 10
    seed: Seed = 12345
    eval_fraction: Share = 0.02
    eval_max_samples: Annotated[int, Field(ge=1, le=10**12)] | None = None
    eval_input: Text | None = None
    eval_pick: Literal["first", "evenly"] = "first"
    language: Annotated[str, Field(pattern=r"^([a-z]{2,3}(-[A-Za-z0-9-]+)?|auto)$")] = AUTO
    cased: bool | None = None
    max_unknown: Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)] = 0.05
    workers: Annotated[int, Field(ge=1, le=1024)] | None = None

    @model_validator(mode="after")
    def _predictions_fit(self) -> RecipeFile:
        if self.max_predictions > self.max_seq_len:
            raise ValueError(
                f"max_predictions={self.max_predictions} is more than the tokens of a sample, max_seq_len={self.max_seq_len}"
            )
        return self


def read_recipe(path: str | Path) -> RecipeFile:
    """Read a recipe file.

    Raises:
        UserError: the file is missing, empty or not YAML, or has an unknown field or a wrong value; the field is named.
    """
    tree = read_yaml(path, "recipe", f"fields ({', '.join(RecipeFile.model_fields)})", "configs/data/pydocs_mini.yaml")
    if not tree:
        raise UserError(f"recipe {path} is empty; configs/data/pydocs_mini.yaml is an example")
    return validate(RecipeFile, tree, f"recipe {path}")
