"""Dynamic masking (open division): each use of a sample predicts other tokens of it (RoBERTa, arXiv 1907.11692).

A sample keeps its number of masks, so that plans and counts stay valid. The draw is a hash of seed, step, sample and
position: it does not depend on which rank has the sample, nor on what else is in its batch.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np

from bert_fast.data.batch import Batch
from bert_fast.errors import UserError
from bert_fast.integers import SPLITMIX64, mix64, segment_ids, segment_positions


def mask_id_of(manifest: dict[str, Any], folder: str) -> int:
    """The id of [MASK] in a store's vocabulary. Raises UserError if the manifest does not have it."""
    if "mask_id" not in manifest:
        raise UserError(f"store {folder} does not say which token is [MASK]; prepare or import it again")
    return int(manifest["mask_id"])


def redraw(batch: Batch, *, seed: int, step: int, mask_id: int, vocab_size: int) -> Batch:
    """The batch with new masked positions, labels and replacements: 80 % [MASK], 10 % random, 10 % unchanged."""
    ids = batch.input_ids.copy()
    ids[batch.masked_positions] = batch.masked_labels
    starts, lengths = batch.cu_seqlens[:-1].astype(np.int64), np.asarray(batch.lengths)
    owner = segment_ids(lengths)
    counts = np.bincount(owner[batch.masked_positions], minlength=len(lengths))
    with np.errstate(over="ignore"):
        base = mix64(
            np.uint64(seed) * SPLITMIX64[1] + np.uint64(step) + batch.sample_ids.astype(np.uint64) * SPLITMIX64[2]
        )
        keys = mix64(base[owner] + batch.position_ids.astype(np.uint64) * SPLITMIX64[0])
    special = np.zeros(len(ids), bool)
    special[starts] = special[starts + lengths - 1] = True
    second = np.flatnonzero((batch.token_type_ids == 1) & (batch.position_ids > 0))
    first_of_b = second[np.flatnonzero(np.diff(second, prepend=-2) > 1)]
    special[first_of_b - 1] = True  # the [SEP] between A and B
    keys[special] = np.iinfo(np.uint64).max
    order = np.lexsort((keys, owner))  # every sample's tokens, in a random order
    rank = segment_positions(lengths)
    positions = np.sort(order[rank < np.repeat(counts, lengths)])
    labels = ids[positions]
    with np.errstate(over="ignore"):
        draw = mix64(keys[positions] ^ SPLITMIX64[1])
    kind = (draw >> np.uint64(40)).astype(np.float64) / 2**24
    other = (draw & np.uint64(0xFFFFFFFF)) % np.uint64(vocab_size)
    ids[positions] = np.where(kind < 0.8, mask_id, np.where(kind < 0.9, other.astype(np.int64), labels))
    return replace(batch, input_ids=ids, masked_positions=positions, masked_labels=labels)
