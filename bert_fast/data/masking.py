"""Dynamic masking (open division): each use of a sample predicts other tokens of it (RoBERTa, arXiv 1907.11692).

A sample keeps its number of masks, or has the number that follows from its length and `data.mask_fraction`: every rank knows
the number of masks of a global batch from the plan. The draw is a hash of seed, step, sample and position: it does not depend
on which rank has the sample, nor on what else is in its batch.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np

from bert_fast.config import DataConfig
from bert_fast.data.batch import Batch
from bert_fast.data.samples import num_to_predict
from bert_fast.errors import UserError
from bert_fast.integers import SPLITMIX64, mix64, segment_ids, segment_positions


def mask_id_of(manifest: dict[str, Any], folder: str) -> int:
    """The id of [MASK] in a store's vocabulary. Raises UserError if the manifest does not have it."""
    if "mask_id" not in manifest:
        raise UserError(f"store {folder} does not say which token is [MASK]; prepare or import it again")
    return int(manifest["mask_id"])


def check_fraction(manifest: dict[str, Any], folder: str, config: DataConfig) -> None:
    """Refuse a `data.mask_fraction` that the masks of a store do not have, where they are not drawn anew.

    Args:
        manifest: of the store in `folder`.

    Raises:
        UserError: the store was made with another fraction, or does not say with which.
    """
    if config.mask_fraction is None or config.dynamic_masking:
        return
    parameters = manifest.get("params")
    own = parameters.get("mask_prob") if isinstance(parameters, dict) else None
    if own == config.mask_fraction:
        return
    has = (
        f"was made with a mask fraction of {own}"
        if own is not None
        else "does not say with which mask fraction it was made"
    )
    raise UserError(
        f"store {folder} {has}, and data.mask_fraction={config.mask_fraction}; set data.dynamic_masking=true to draw its masks "
        "anew, or leave data.mask_fraction unset to use its own"
    )


def redraw(
    batch: Batch, *, seed: int, step: int, mask_id: int, vocab_size: int, fraction: float | None = None
) -> Batch:
    """The batch with new masked positions, labels and replacements: 80 % [MASK], 10 % random, 10 % unchanged.

    Args:
        fraction: of each sample's tokens that are predicted (`samples.num_to_predict`); None: as many as before.
    """
    ids = batch.input_ids.copy()
    ids[batch.masked_positions] = batch.masked_labels
    starts, lengths = batch.cu_seqlens[:-1].astype(np.int64), np.asarray(batch.lengths)
    owner = segment_ids(lengths)
    if fraction is None:
        counts = np.bincount(owner[batch.masked_positions], minlength=len(lengths))
    else:
        counts = num_to_predict(lengths, fraction)
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
