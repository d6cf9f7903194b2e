"""What `memory.recompute` chooses from: a chain and a budget to a plan. The chain is one of `memory.chain.encoder_chain`.

Stage 0 is the embeddings, stages 1 and 2 are the two halves of the first layer, and so on; the last one is the heads, which
compute their gradient with the loss and are always kept.
"""

from __future__ import annotations

from bert_fast.memory.remat import Chain, Plan, Stage, fastest_within, keep_all, least_peak, pareto, recompute_runs


def none(chain: Chain, budget_bytes: int | None) -> Plan:
    """Nothing is computed again by stages."""
    return keep_all(chain)


def layer(chain: Chain, budget_bytes: int | None) -> Plan:
    """Each layer keeps its input."""
    return recompute_runs(chain, range(3, len(chain.stages), 2), first=1)


def half_layer(chain: Chain, budget_bytes: int | None) -> Plan:
    """Each half of a layer keeps its input."""
    return recompute_runs(chain, range(2, len(chain.stages)), first=1)


def optimal(chain: Chain, budget_bytes: int | None) -> Plan:
    """The least peak."""
    return least_peak(chain)


def budget(chain: Chain, budget_bytes: int | None) -> Plan:
    """The least time within the budget. Raises BudgetTooSmallError."""
    assert budget_bytes is not None, "the config has been checked"
    return fastest_within(pareto(chain), budget_bytes)


def encoder_names(num_layers: int) -> list[str]:
    """Names of the stages, in order."""
    halves = (f"layers.{number}.{half}" for number in range(num_layers) for half in ("attention", "feed_forward"))
    return ["embeddings", *halves, "heads"]


def equal_chain(num_layers: int) -> Chain:
    """Stages of one byte and one second each: for the plans that do not depend on sizes."""
    return Chain(tuple(Stage(name, 1, 1, 1.0) for name in encoder_names(num_layers)))
