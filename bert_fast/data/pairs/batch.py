"""A batch of pairs as a batch of their texts."""

from __future__ import annotations

import numpy as np

from bert_fast.data.batch import Batch
from bert_fast.integers import segment_positions


def texts_of(batch: Batch) -> Batch:
    """The texts of a batch of pairs as sequences of their own, pair by pair: query, positive, negatives.

    Args:
        batch: B pairs of K texts each with T tokens, as `PairStore.batch` gives them: `masked_positions` is where texts start.
            It has no padding.

    Returns:
        A batch of B K sequences over the same T tokens, in the order of the pairs, so that not the longest text is first.
        Positions begin anew in each text and token types are 0. `masked_positions`, int64 [B K], is the first token of each
        text, [CLS]. `masked_labels` and `next_sentence_labels` are zeros, int64 [B K], and `sample_ids`, int64 [B K], is the
        pair of each text.

    Raises:
        ValueError: texts do not start where pairs start, or not every pair has as many.
    """
    num_pairs, starts = len(batch.lengths), batch.masked_positions
    per_pair, rest = divmod(len(starts), max(1, num_pairs))
    if rest or per_pair < 2 or not np.array_equal(starts[::per_pair], batch.cu_seqlens[:-1]):
        raise ValueError(f"{len(starts)} texts in {num_pairs} pairs: no batch of pairs, or one with padding")
    cu_seqlens = np.append(starts, batch.num_tokens)
    lengths = np.diff(cu_seqlens)
    if lengths.min() < 1:
        raise ValueError("a text of a pair has no token, or starts before the one in front of it")
    zeros = np.zeros(len(starts), dtype=np.int64)
    return Batch(
        input_ids=batch.input_ids,
        token_type_ids=np.zeros(batch.num_tokens, dtype=np.int64),
        position_ids=segment_positions(lengths),
        cu_seqlens=cu_seqlens.astype(np.int32),
        masked_positions=starts,
        masked_labels=zeros,
        next_sentence_labels=zeros.copy(),
        lengths=lengths.tolist(),
        sample_ids=np.repeat(batch.sample_ids, per_pair),
    )
