"""From `memory.recompute` and a chain to a plan, and what there is to say of it."""

from __future__ import annotations

from dataclasses import dataclass

from bert_fast.config import Config
from bert_fast.config.choices import RECOMPUTE, find
from bert_fast.errors import UserError
from bert_fast.memory.estimate import kept_from_step_to_step
from bert_fast.memory.remat import BudgetTooSmallError, Chain, Plan, keep_all

_GIB, _MIB = 2**30, 2**20


@dataclass(frozen=True)
class Recomputation:
    """What was planned, of the longest micro-batch that the config allows.

    peak_bytes:    activations at most; None where the plan did not need to know
    kept_bytes:    the same if all of them were kept
    forward_share: of the forward pass's time, what is computed again
    """

    how: str
    num_recomputed: int
    num_stages: int
    peak_bytes: int | None = None
    kept_bytes: int | None = None
    forward_share: float | None = None

    def summary(self) -> str:
        """For the log, on one line."""
        text = f"memory.recompute={self.how}: {self.num_recomputed} of {self.num_stages} half layers run twice"
        if self.peak_bytes is None or self.kept_bytes is None or self.forward_share is None:
            return text
        return (
            f"{text}; activations at most {self.peak_bytes / _MIB:,.0f} MiB instead of {self.kept_bytes / _MIB:,.0f}, for "
            f"{100 * self.forward_share:.0f} % of a forward pass"
        )


def make_recomputation_plan(config: Config, chain: Chain) -> Plan:
    """The plan of the config for a chain. Raises UserError where the budget is too small for any."""
    how, budget_bytes = config.memory.recompute, None
    if how == "none":
        return keep_all(chain)
    held = kept_from_step_to_step(config).total
    if config.memory.budget_gib is not None:
        budget_bytes = int(config.memory.budget_gib * _GIB) - held
    try:
        plan: Plan = find(RECOMPUTE, how)(chain, budget_bytes)
    except BudgetTooSmallError as error:
        least = (held + error.least_bytes) / _GIB
        raise UserError(
            f"memory.budget_gib={config.memory.budget_gib:g} is too small: weights, gradients and optimizer take "
            f"{held / _GIB:.3f} GiB of a rank and the activations of batch.micro_batch_size={config.batch.micro_batch_size} at "
            f"least {error.least_bytes / _GIB:.3f}; set it to {least:.3f} or more, or lower batch.micro_batch_size, or set "
            "communication.shard_optimizer=true"
        ) from None
    return plan
