"""From a plan to the input of a step, and batches made up for warm-up and dry runs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch

from bert_fast.balance.planner import Plan
from bert_fast.config import Config
from bert_fast.data.batch import Batch, in_rows, padded, to_longest
from bert_fast.data.loader import Prefetcher
from bert_fast.data.samples import num_to_predict
from bert_fast.data.store import Store
from bert_fast.integers import segment_positions
from bert_fast.model.attention import SequenceLayout
from bert_fast.model.bert import BertInput
from bert_fast.train.step import StepInput


@dataclass(frozen=True)
class PlannedStep:
    """This rank's batches of a step, and what all ranks know of the step from its plan."""

    plan: Plan
    batches: list[Batch]
    num_masked: int
    num_tokens: int
    num_tokens_squared: int

    def micro_batch_tokens(self) -> list[int]:
        """Tokens of every micro-batch of this rank."""
        return [batch.num_tokens for batch in self.batches]


def plan_step(
    store: Store, plan: Plan, rank: int, config: Config, change: Callable[[Batch], Batch] | None = None
) -> PlannedStep:
    """Read a rank's batches of a plan from the store; `change` is made to the samples before they are laid out."""
    _ = plan.checksum  # is kept in the plan: where this runs in the background, no step waits for it
    batches = planned_batches(store, plan, rank, config.data.max_seq_len, change, config.data.mask_share)
    lengths = store.lengths[plan.ids].astype(np.int64)
    fraction = config.data.drawn_fraction
    num_masked = store.num_masked[plan.ids] if fraction is None else num_to_predict(lengths, fraction)
    return PlannedStep(plan, batches, int(num_masked.sum(dtype=np.int64)), int(lengths.sum()), int((lengths**2).sum()))


def step_input(planned: PlannedStep, config: Config, device: torch.device) -> StepInput:
    """A planned step on the device."""
    inputs = [to_device(batch, device, config.batch.shape_multiple) for batch in planned.batches]
    return StepInput(inputs, planned.num_masked, config.batch.global_batch_size)


class StepLoader:
    """Yields a run's steps in order, each as `(PlannedStep, StepInput)`; plans and reads ahead in a background thread."""

    def __init__(
        self, read_step: Callable[[int], PlannedStep], first_step: int, config: Config, device: torch.device
    ) -> None:
        """
        Args:
            read_step: plans and reads a step by its number; called in the background, `balance.prefetch` steps ahead.
        """
        self._config, self._device = config, device
        self._prefetcher = Prefetcher(read_step, first_step, config.train.max_steps, config.balance.prefetch)

    def __iter__(self) -> Iterator[tuple[PlannedStep, StepInput]]:
        return self

    def __next__(self) -> tuple[PlannedStep, StepInput]:
        planned = self._prefetcher.next()
        return planned, step_input(planned, self._config, self._device)

    def close(self) -> None:
        """Stop the thread."""
        self._prefetcher.close()


def planned_batches(
    store: Store,
    plan: Plan,
    rank: int,
    max_seq_len: int,
    change: Callable[[Batch], Batch] | None = None,
    mask_share: float = 0.15,
) -> list[Batch]:
    """The micro-batches of a rank in a step, laid out as the plan has it. `change` is made to the samples before."""
    batches = []
    for part in plan.micro_batches(rank):
        batch = store.batch(plan.ids[part], keep_order=plan.rows is not None)
        batches.append(lay_out(change(batch) if change else batch, plan, part, max_seq_len, mask_share))
    return batches


def lay_out(batch: Batch, plan: Plan, part: slice, max_seq_len: int, mask_share: float = 0.15) -> Batch:
    """The micro-batch `part` of a plan with the padding of the plan's layout; most have none."""
    if plan.rows is not None:
        return in_rows(batch, plan.rows[part], plan.num_rows, max_seq_len, mask_share)
    return to_longest(batch) if plan.layout == "longest" else batch


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
    position_ids = segment_positions(lengths)
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
