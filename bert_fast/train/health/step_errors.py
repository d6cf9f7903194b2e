"""The error of a failed step, in words that tell the user what to change."""

from __future__ import annotations

import socket

import numpy as np
import torch

from bert_fast.balance.planner import Plan
from bert_fast.data.scrub import Scrubber
from bert_fast.errors import TrainingError, UserError

_NO_MEMORY = ("can't allocate memory", "out of memory", "bad allocation", "Cannot allocate memory")


def explain(error: Exception, plan: Plan, rank: int, tokens: list[int], scrubber: Scrubber) -> Exception:
    """The error itself, or one that says what is behind it: a store that changed under the run, or too little memory.

    A changed token beyond the vocabulary is an IndexError, perhaps before `scrubber` comes round to it.
    """
    if isinstance(error, IndexError | ValueError):
        changed = scrubber.changed(np.concatenate([plan.ids[part] for part in plan.micro_batches(rank)]))
        return UserError(f"rank {rank} on {socket.gethostname()}: {changed}") if changed else error
    return explain_memory(error, plan, rank, tokens) if isinstance(error, RuntimeError) else error


def explain_memory(error: RuntimeError, plan: Plan, rank: int, tokens: list[int]) -> RuntimeError | TrainingError:
    """The error itself, or, where memory ran out, one that says how much was asked of it and what reduces that."""
    if not isinstance(error, torch.OutOfMemoryError) and not any(words in str(error) for words in _NO_MEMORY):
        return error
    return TrainingError(
        f"step {plan.step}, rank {rank}: out of memory with {max(tokens):,} tokens in a micro-batch. Lower "
        "batch.micro_batch_size and raise batch.gradient_accumulation_steps as much, set communication.shard_optimizer=true, "
        "or train.precision=bf16; balance.max_tokens caps a micro-batch of balanced_free"
    )
