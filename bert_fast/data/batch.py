"""A batch: the tokens of all its samples end to end, without padding."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from bert_fast.data.record import read_headers, sections_of
from bert_fast.integers import ceil_div, segment_positions, segment_ranges


@dataclass(frozen=True)
class Batch:
    """Flat arrays of B samples with T tokens and M masked positions. Samples lie longest first, or row by row if packed.

    input_ids, token_type_ids, position_ids: int64 [T]
    cu_seqlens: int32 [B + 1], where samples start and end
    masked_positions: int64 [M], indices into T; masked_labels: int64 [M]
    next_sentence_labels: int64 [B], 1 where B comes from another document
    lengths: list of B integers; sample_ids: int64 [B]

    Where a batch is padded, it is with dummy sequences of token 0 that no sample attends to. They are in `lengths` and
    `cu_seqlens`, and their next-sentence labels are -1 (or absent, at the end). Masked labels of -1 do not count either.
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
    """Pad to a multiple of `multiple` tokens with a last dummy sequence, and to a multiple of a quarter of it masks.

    Kernels are prepared for every new shape, so there should be few shapes.
    """
    extra_tokens = -batch.num_tokens % multiple
    batch = _more_masks(batch, -len(batch.masked_labels) % max(1, multiple // 4))
    if not extra_tokens:
        return batch
    zeros = np.zeros(extra_tokens, dtype=np.int64)
    return replace(
        batch,
        input_ids=np.concatenate([batch.input_ids, zeros]),
        token_type_ids=np.concatenate([batch.token_type_ids, zeros]),
        position_ids=np.concatenate([batch.position_ids, zeros]),
        cu_seqlens=np.append(batch.cu_seqlens, np.int32(batch.num_tokens + extra_tokens)),
        lengths=[*batch.lengths, extra_tokens],
    )


def in_rows(batch: Batch, rows: np.ndarray, num_rows: int, row_length: int, mask_share: float = 0.15) -> Batch:
    """Lay samples, which are sorted by row, into rows of `row_length` tokens, each filled up with a dummy sequence.

    Args:
        rows: int64 [B], the row of every sample, ascending.
        mask_share: share of the tokens that are masked.

    Returns:
        A batch of num_rows * row_length tokens, and of masked positions a multiple of one hundredth more than `mask_share`
        of that (they are rounded sample by sample), so that nearly all batches have one shape.
    """
    lengths = np.array(batch.lengths)
    gaps = row_length - np.bincount(rows, lengths, num_rows).astype(np.int64)
    filled = np.flatnonzero(gaps)
    # A row's dummy comes after its samples: sort (row, is dummy).
    place = np.argsort(np.concatenate([2 * rows, 2 * filled + 1]), kind="stable")
    spread = _spread(batch, np.concatenate([lengths, gaps[filled]])[place], place < len(lengths))
    room = num_rows * ceil_div(round(1000 * mask_share + 10) * row_length, 1000)
    return _more_masks(spread, -len(batch.masked_labels) % room)


def to_longest(batch: Batch) -> Batch:
    """Pad to as many tokens as if every sample were padded to the longest; nothing attends to the padding."""
    lengths = np.array(batch.lengths)
    gaps = lengths.max() - lengths
    gaps = np.sort(gaps[gaps > 0])[::-1]
    every = np.concatenate([lengths, gaps])
    return _spread(batch, every, np.arange(len(every)) < len(lengths))


def _spread(batch: Batch, lengths: np.ndarray, is_sample: np.ndarray) -> Batch:
    """Insert dummy sequences between the samples: `lengths` [S] of all sequences, `is_sample` bool [S]."""
    starts = np.concatenate([[0], np.cumsum(lengths)])
    shift = starts[:-1][is_sample] - batch.cu_seqlens[:-1]
    target = np.arange(batch.num_tokens) + np.repeat(shift, batch.lengths)

    def at_target(values: np.ndarray) -> np.ndarray:
        out = np.zeros(int(starts[-1]), values.dtype)
        out[target] = values
        return out

    labels = np.full(len(lengths), -1, dtype=np.int64)
    labels[is_sample] = batch.next_sentence_labels
    return replace(
        batch,
        input_ids=at_target(batch.input_ids),
        token_type_ids=at_target(batch.token_type_ids),
        position_ids=at_target(batch.position_ids),
        cu_seqlens=starts.astype(np.int32),
        masked_positions=target[batch.masked_positions],
        next_sentence_labels=labels,
        lengths=lengths.tolist(),
    )


def _more_masks(batch: Batch, count: int) -> Batch:
    """Add `count` masked positions that do not count."""
    return replace(
        batch,
        masked_positions=np.concatenate([batch.masked_positions, np.zeros(count, dtype=np.int64)]),
        masked_labels=np.concatenate([batch.masked_labels, np.full(count, -1, dtype=np.int64)]),
    )


def assemble(
    tokens: np.ndarray, starts: np.ndarray, ends: np.ndarray, sample_ids: np.ndarray, keep_order: bool = False
) -> Batch:
    """Join the records tokens[start:end] of samples into a batch.

    Args:
        tokens: uint16, the records of a store (`data.record`).
        starts, ends: int64 [B], where the records lie in `tokens`.
        sample_ids: int64 [B].
        keep_order: keep the given order; else samples are laid longest first, so that neighbours of similar length share
            an attention group.
    """
    headers = read_headers(tokens, starts)
    sections = sections_of(starts, headers.num_masked)
    lengths = ends - sections.tokens
    order = np.arange(len(lengths)) if keep_order else np.argsort(-lengths, kind="stable")
    lengths = lengths[order]
    len_a, num_masked, is_random_next = (column[order] for column in headers)
    positions_at, _, tokens_at = (column[order] for column in sections)
    cu_seqlens = np.zeros(len(order) + 1, dtype=np.int64)
    np.cumsum(lengths, out=cu_seqlens[1:])
    position_ids = segment_positions(lengths)
    mask_places = segment_ranges(positions_at, num_masked)
    positions = tokens[mask_places].astype(np.int64)
    labels = tokens[mask_places + np.repeat(num_masked, num_masked)].astype(np.int64)
    token_places = np.repeat(tokens_at, lengths) + position_ids
    return Batch(
        input_ids=tokens[token_places].astype(np.int64),
        token_type_ids=(position_ids >= np.repeat(len_a, lengths)).astype(np.int64),
        position_ids=position_ids,
        cu_seqlens=cu_seqlens.astype(np.int32),
        masked_positions=positions + np.repeat(cu_seqlens[:-1], num_masked),
        masked_labels=labels,
        next_sentence_labels=is_random_next,
        lengths=lengths.tolist(),
        sample_ids=np.asarray(sample_ids)[order],
    )
