"""`memory.budget_gib` of a run that leaves the choice open: the switches are chosen before anything is built."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from bert_fast.config import Config
from bert_fast.errors import UserError
from bert_fast.hardware import cpu_has_bf16
from bert_fast.memory.budget import MACHINES, Fit, fit, with_changes
from bert_fast.memory.estimate import MemoryEstimate, chain_of, estimate
from bert_fast.memory.recomputation import make_recomputation_plan
from bert_fast.memory.remat import Chain, Plan, least_peak
from bert_fast.memory.stages import Hardware, longest_micro_batch
from bert_fast.model.loss import chunk_rows

_SHOWN = 3  # other candidates


def hardware_of(config: Config, dtype: torch.dtype) -> Hardware:
    """How the config's device computes the model; the one that is found, where the config leaves it open."""
    return _hardware(config, dtype, _found_kind(config))


def likely_hardware(config: Config, kind: str) -> Hardware:
    """How a device of this kind (`cpu` or `cuda`) computes the config, without asking a GPU for its formats: that would take
    memory of a card in every rank."""
    precision = config.train.precision
    whole = precision == "fp32" or (precision == "auto" and kind == "cpu" and not cpu_has_bf16())
    return _hardware(config, torch.float32 if whole else torch.bfloat16, kind)


def _found_kind(config: Config) -> str:
    device = config.system.device
    return "cpu" if device == "cpu" or (device == "auto" and not torch.cuda.is_available()) else "cuda"


def _hardware(config: Config, dtype: torch.dtype, kind: str) -> Hardware:
    rows = chunk_rows(config.model.vocab_size, kind)
    return Hardware(4 if dtype == torch.float32 else 2, kind == "cpu", rows)


@dataclass(frozen=True)
class PlannedMemory:
    """The memory of the longest micro-batch that a config allows, and how it is run.

    too_small: what is wrong with the budget, if no plan keeps to it; the plan is then the one of least peak
    """

    memory: MemoryEstimate
    chain: Chain
    plan: Plan
    too_small: str | None = None


def memory_at_most(config: Config, dtype: torch.dtype) -> PlannedMemory:
    """Plan `memory.recompute` as the run will, from the model's shape."""
    hardware = hardware_of(config, dtype)
    chain = chain_of(config, longest_micro_batch(config), hardware)
    try:
        plan, problem = make_recomputation_plan(config, chain), None
    except UserError as error:
        plan, problem = least_peak(chain), str(error)
    return PlannedMemory(estimate(config, chain, plan, on_cpu=hardware.on_cpu), chain, plan, problem)


def is_open(config: Config) -> bool:
    """Whether a budget is given, and what is done to keep to it is not."""
    return config.memory.budget_gib is not None and config.memory.recompute == "none"


def fit_to_budget(config: Config) -> tuple[Config, Fit]:
    """The config with the switches of the fastest way within its budget: the same on every rank and at every start.

    Raises:
        UserError: nothing fits.
    """
    assert config.memory.budget_gib is not None
    kind = _found_kind(config)
    # The optimizer's state stays where it is: a checkpoint has it in one form, and may be resumed with another budget
    found = fit(config, config.memory.budget_gib, likely_hardware(config, kind), MACHINES[kind], may_move_state=False)
    return with_changes(config, found.changes()), found


def fit_lines(found: Fit) -> list[str]:
    """What was chosen, the next best, and what could not be had, each on a line."""
    lines = [f"memory.budget_gib={found.budget_bytes / 2**30:g}: {found.best.text()}"]
    lines += [f"then: {other.text()}" for other in found.runners_up[:_SHOWN]]
    return [*lines, *(f"not {switch}: {reason}" for switch, reason in found.refused.items())]
