"""Batches on the device, and batches made up for warm-up and dry runs."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch

from bert_fast.balance.planner import Plan
from bert_fast.data.batch import Batch, in_rows, padded, to_longest
from bert_fast.data.store import Store
from bert_fast.model.attention import SequenceLayout
from bert_fast.model.bert import BertInput


def planned_batches(
    store: Store, plan: Plan, rank: int, strategy: str, max_seq_len: int, change: Callable[[Batch], Batch] | None = None
) -> list[Batch]:
    """The micro-batches of a rank in a step, laid out as the strategy has it. `change` is made to the samples before."""
    batches = []
    for part in plan.micro_batches(rank):
        batch = store.batch(plan.ids[part], keep_order=plan.rows is not None)
        batches.append(lay_out(change(batch) if change else batch, plan, part, strategy, max_seq_len))
    return batches


def lay_out(batch: Batch, plan: Plan, part: slice, strategy: str, max_seq_len: int) -> Batch:
    """The micro-batch `part` of a plan with the padding of its strategy; most have none."""
    if plan.rows is not None:
        return in_rows(batch, plan.rows[part], plan.num_rows, max_seq_len)
    return to_longest(batch) if strategy == "pad_to_longest" else batch


def to_device(batch: Batch, device: torch.device, multiple: int = 1) -> BertInput:
    """Copy a batch, its shape padded to `multiple`, to the device (from pinned memory and without waiting on CUDA)."""
    batch = padded(batch, multiple)

    def move(array: np.ndarray) -> torch.Tensor:
        tensor = torch.from_numpy(array)
        return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)

    return BertInput(
        move(batch.input_ids),
        move(batch.token_type_ids),
        move(batch.position_ids),
        move(batch.masked_positions),
        move(batch.masked_labels),
        move(batch.next_sentence_labels),
        SequenceLayout(batch.lengths, move(batch.cu_seqlens)),
    )


def synthetic_batch(num_samples: int, max_seq_len: int, vocab_size: int, seed: int, mask_share: float = 0.15) -> Batch:
    """Random tokens, half of the samples of full length, the rest of random lengths; touches no data set."""
    rng = np.random.default_rng([seed, 99])
    lengths = np.sort(rng.integers(5, max_seq_len + 1, num_samples))[::-1].copy()
    lengths[: num_samples // 2] = max_seq_len
    return batch_of_lengths(lengths, vocab_size, rng, mask_share)


def batch_of_lengths(lengths: np.ndarray, vocab_size: int, rng: np.random.Generator, mask_share: float = 0.15) -> Batch:
    """Random tokens in sequences of these lengths (int64 [B])."""
    num_samples = len(lengths)
    cu_seqlens = np.concatenate([[0], np.cumsum(lengths)])
    tokens = int(cu_seqlens[-1])
    position_ids = np.arange(tokens) - np.repeat(cu_seqlens[:-1], lengths)
    masked = np.sort(rng.permutation(tokens)[: max(1, int(mask_share * tokens))])
    return Batch(
        rng.integers(0, vocab_size, tokens),
        (position_ids > np.repeat(lengths // 2, lengths)).astype(np.int64),
        position_ids.astype(np.int64),
        cu_seqlens.astype(np.int32),
        masked.astype(np.int64),
        rng.integers(0, vocab_size, len(masked)),
        rng.integers(0, 2, num_samples),
        lengths.tolist(),
        np.full(num_samples, -1, dtype=np.int64),
    )
