"""A batch: the tokens of all its samples end to end, no padding."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np


@dataclass(frozen=True)
class Batch:
    """Flat arrays of B samples with T tokens and M masked positions. Samples lie longest first.

    input_ids, token_type_ids, position_ids: int64 [T]
    cu_seqlens: int32 [B + 1], where samples start and end
    masked_positions: int64 [M], indices into T; masked_labels: int64 [M]
    next_sentence_labels: int64 [B], 1 where B comes from another document
    lengths: B host integers; sample_ids: int64 [B]

    A padded batch (`padded`) has one more sequence in `lengths` and `cu_seqlens`, and masked labels of -1 that do not
    count.
    """

    input_ids: np.ndarray
    token_type_ids: np.ndarray
    position_ids: np.ndarray
    cu_seqlens: np.ndarray
    masked_positions: np.ndarray
    masked_labels: np.ndarray
    next_sentence_labels: np.ndarray
    lengths: list[int]
    sample_ids: np.ndarray

    @property
    def num_tokens(self) -> int:
        return len(self.input_ids)


def padded(batch: Batch, multiple: int) -> Batch:
    """The batch with a last dummy sequence that makes its tokens a multiple of `multiple`, its masks of a quarter of it.

    Kernels are prepared for every new shape: with few shapes they are prepared once.
    """
    extra_tokens = -batch.num_tokens % multiple
    extra_masks = -len(batch.masked_labels) % max(1, multiple // 4)
    if not extra_tokens and not extra_masks:
        return batch
    zeros = np.zeros(extra_tokens, dtype=np.int64)
    ends = [batch.num_tokens + extra_tokens] if extra_tokens else []
    return replace(
        batch,
        input_ids=np.concatenate([batch.input_ids, zeros]),
        token_type_ids=np.concatenate([batch.token_type_ids, zeros]),
        position_ids=np.concatenate([batch.position_ids, zeros]),
        cu_seqlens=np.concatenate([batch.cu_seqlens, np.array(ends, dtype=np.int32)]),
        masked_positions=np.concatenate([batch.masked_positions, np.zeros(extra_masks, dtype=np.int64)]),
        masked_labels=np.concatenate([batch.masked_labels, np.full(extra_masks, -1, dtype=np.int64)]),
        lengths=batch.lengths + [extra_tokens] * bool(extra_tokens),
    )


def assemble(tokens: np.ndarray, starts: np.ndarray, ends: np.ndarray, sample_ids: np.ndarray) -> Batch:
    """Join the records tokens[start:end] of samples into a batch, without a Python loop over samples.

    A record is uint16: len_a, M, is_random_next, M positions, M labels, L tokens (`data.store`).
    """
    headers = tokens[starts[:, None] + np.arange(3)].astype(np.int64)
    lengths = ends - starts - 3 - 2 * headers[:, 1]
    order = np.argsort(-lengths, kind="stable")  # neighbours of like length share an attention group
    starts, headers, lengths = starts[order], headers[order], lengths[order]
    len_a, num_masked = headers[:, 0], headers[:, 1]
    cu_seqlens = np.zeros(len(order) + 1, dtype=np.int64)
    np.cumsum(lengths, out=cu_seqlens[1:])
    position_ids = _counting(lengths)
    mask_places = np.repeat(starts + 3, num_masked) + _counting(num_masked)
    positions = tokens[mask_places].astype(np.int64)
    labels = tokens[mask_places + np.repeat(num_masked, num_masked)].astype(np.int64)
    token_places = np.repeat(starts + 3 + 2 * num_masked, lengths) + position_ids
    return Batch(
        input_ids=tokens[token_places].astype(np.int64),
        token_type_ids=(position_ids >= np.repeat(len_a, lengths)).astype(np.int64),
        position_ids=position_ids,
        cu_seqlens=cu_seqlens.astype(np.int32),
        masked_positions=positions + np.repeat(cu_seqlens[:-1], num_masked),
        masked_labels=labels,
        next_sentence_labels=headers[:, 2].copy(),
        lengths=lengths.tolist(),
        sample_ids=np.asarray(sample_ids)[order],
    )


def _counting(counts: np.ndarray) -> np.ndarray:
    """0 ... counts[0] - 1, 0 ... counts[1] - 1, and so on, end to end."""
    ends = np.cumsum(counts)
    return np.arange(ends[-1], dtype=np.int64) - np.repeat(ends - counts, counts)
