"""The variants of everything a config can choose by name. One table per kind; a new variant is one file and one entry here.

An entry says where the variant is (`module:attribute`, imported when it is chosen, so that this module needs none of them)
and what it is, for `--help`. What the attribute must be is said above each table; docs/architecture.md and CONTRIBUTING.md
have the recipes.
"""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Callable, Mapping
from typing import Annotated, Any, NamedTuple

from pydantic import AfterValidator


class Choice(NamedTuple):
    """A variant: `where` it is, as `module:attribute`, and what it is, in a few words."""

    where: str
    what: str


# A function (named parameters, OptimizerConfig) -> torch.optim.Optimizer, as bert_fast/optim/adamw.py has it.
OPTIMIZERS = {
    "adamw": Choice("bert_fast.optim.adamw:build", "torch's fused AdamW"),
    "lamb": Choice("bert_fast.optim.lamb:build", "LAMB as MLPerf's reference has it"),
}

# A subclass of bert_fast.communication.engine.Engine. In SHARDED_ENGINES: what takes its place with
# communication.shard_optimizer, where each rank updates a part of the weights.
ENGINES = {
    "bucketed": Choice("bert_fast.communication.reducer:BucketReducer", "our reducer, overlapped with backward"),
    "ddp": Choice("bert_fast.communication.ddp:DdpEngine", "torch's DistributedDataParallel with the same clipping"),
}
SHARDED_ENGINES = {
    "bucketed": Choice(
        "bert_fast.communication.sharded:ShardedReducer", "reduce-scatter, update of shards, all-gather"
    ),
}

# A class as bert_fast.model.objective.Objective describes it.
OBJECTIVES = {
    "mlm_nsp": Choice("bert_fast.model.objective:MlmNsp", "masked-token and next-sentence prediction, as BERT has it"),
}


def one_of(table: Mapping[str, Choice]) -> Any:
    """The type of a config field whose values are the names of a table, checked when a config is read."""

    def check(name: str) -> str:
        if name not in table:
            near = difflib.get_close_matches(name[:100], table, n=1)
            guess = f"; did you mean {near[0]}?" if near else ""
            raise ValueError(f"must be one of {', '.join(table)}, not '{name[:100]}'{guess}")
        return name

    return Annotated[str, AfterValidator(check), Names(table)]


class Names(NamedTuple):
    """Marks a field's type with the table that its values are from, for `--help`."""

    table: Mapping[str, Choice]


def find(table: Mapping[str, Choice], name: str) -> Callable[..., Any]:
    """Import the variant `name` of a table."""
    module, _, attribute = table[name].where.partition(":")
    found: Callable[..., Any] = getattr(importlib.import_module(module), attribute)
    return found
