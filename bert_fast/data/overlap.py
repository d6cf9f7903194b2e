"""Is the evaluation store's text also in the training store? Found from the samples themselves, in about a second.

Samples of one document differ in how they are cut and masked. So the original tokens are restored, and runs of `_WINDOW` tokens
inside a segment are compared: a sample of which at least the share `_ENOUGH` is covered by runs of the training store was made
from its text. Quotations and licenses repeat runs, but not most of a sample. Documents that a collection holds twice do, and
no split by documents tells them apart.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from itertools import pairwise

import numpy as np

from bert_fast.data.batch import Batch
from bert_fast.data.store import Store
from bert_fast.files import write_json
from bert_fast.integers import SPLITMIX64, ceil_div

_WINDOW = 12  # tokens; more than a phrase, less than a short segment
_ENOUGH = 0.7  # share of a sample's tokens; the rest may lie next to a cut
_PIECES = 64  # of the training store, spread evenly
# Share of the samples of an evaluation store that may be of training text: in the documentation of Python packages, 14 % are
MOST_SHARED = 0.2


@dataclass(frozen=True)
class Shared:
    """`found` of `compared` evaluation samples are of training text; `looked_at` is the share of the training store read."""

    found: int
    compared: int
    looked_at: float = 1.0

    @property
    def is_held_out(self) -> bool:
        return self.found <= MOST_SHARED * self.compared


def shared_text(
    train: Store,
    evaluation: Store,
    eval_samples: int | None = None,
    max_train_tokens: int = 3_000_000,
    max_eval_tokens: int = 500_000,
) -> Shared:
    """How many of the (first `eval_samples`) evaluation samples are of text in the training store.

    Only a part of a large store is read, so that it takes no longer than a small one. The chance to find shared text shrinks
    with that part: for a training store of tens of millions of samples, only an identical token file is found.

    Args:
        max_train_tokens, max_eval_tokens: about the most tokens of each store that are compared, spread evenly over it.
    """
    total = min(len(evaluation), eval_samples or len(evaluation))
    if train.manifest["sha256"] == evaluation.manifest["sha256"]:
        return Shared(total, total)
    count = max(1, int(max_eval_tokens / max(1.0, float(np.mean(evaluation.lengths[:total])))))
    ids = np.unique(np.linspace(0, total - 1, min(count, total)).astype(np.int64))
    batch = evaluation.batch(ids, keep_order=True)
    hashes, starts = _runs(batch)
    theirs, seen = [], 0
    for piece in _pieces(train, max_train_tokens):
        theirs.append(_runs(train.batch(piece, keep_order=True))[0])
        seen += len(piece)
    shared = starts[np.isin(hashes, np.concatenate(theirs))]
    covered, could_be = (_covered(each, batch) for each in (shared, starts))
    found = (covered >= _ENOUGH * could_be) & (could_be > 0)
    return Shared(int(found.sum()), int((could_be > 0).sum()), seen / len(train))


def known_shared_text(train: Store, evaluation: Store) -> Shared | None:
    """What the evaluation store's manifest says about this training store; None if it says nothing."""
    found = evaluation.manifest.get("shared_text")
    if not isinstance(found, dict) or found.get("train_sha256") != train.manifest["sha256"]:
        return None
    return Shared(int(found["found"]), int(found["compared"]), float(found["looked_at"]))


def note_shared_text(train: Store, evaluation: Store) -> Shared:
    """Compare two stores and write the result into the evaluation store's manifest, unless it is there already."""
    shared = known_shared_text(train, evaluation)
    if shared is None:
        shared = shared_text(train, evaluation)
        note = {"train_sha256": train.manifest["sha256"], **asdict(shared)}
        write_json(evaluation.folder / "manifest.json", {**evaluation.manifest, "shared_text": note})
    return shared


def _covered(starts: np.ndarray, batch: Batch) -> np.ndarray:
    """Tokens of every sample that are in runs that start at these indices, int64 [B]."""
    changes = np.zeros(batch.num_tokens + 1, np.int64)
    changes[starts] += 1
    changes[starts + _WINDOW] -= 1
    running = np.concatenate([[0], np.cumsum(np.cumsum(changes)[:-1] > 0)])
    return running[batch.cu_seqlens[1:]] - running[batch.cu_seqlens[:-1]]


def _pieces(store: Store, max_tokens: int) -> list[np.ndarray]:
    """Ids of neighboring samples at evenly spread places; of a small store, all ids."""
    mean = max(1.0, float(store.manifest.get("mean_length") or store.lengths.mean()))
    count = min(len(store), max(1, int(max_tokens / mean)))
    pieces = min(_PIECES, count)
    starts = np.linspace(0, len(store), pieces + 1).astype(np.int64)
    return [np.arange(a, min(b, a + ceil_div(count, pieces))) for a, b in pairwise(starts)]


def _runs(batch: Batch) -> tuple[np.ndarray, np.ndarray]:
    """The hash of every run of tokens inside a segment (uint64 [n]) and its first index in the batch (int64 [n])."""
    tokens = batch.input_ids.astype(np.uint64)
    tokens[batch.masked_positions] = batch.masked_labels.astype(np.uint64)
    is_end = np.zeros(len(tokens) + 1, np.int64)  # [CLS] and [SEP], which no run contains
    is_end[batch.cu_seqlens[:-1]] = 1
    is_end[batch.cu_seqlens[1:] - 1] = 1
    is_end[: len(tokens) - 1][np.diff(batch.token_type_ids) > 0] = 1
    ends = np.concatenate([[0], np.cumsum(is_end)])
    count = max(0, len(tokens) - _WINDOW + 1)
    starts = np.flatnonzero(ends[_WINDOW : _WINDOW + count] == ends[:count])
    hashes = np.zeros(count, np.uint64)
    for offset in range(_WINDOW):  # wraps in 64 bits
        hashes = (hashes + tokens[offset : offset + count] + np.uint64(1)) * SPLITMIX64[0]
        hashes ^= hashes >> np.uint64(29)
    return hashes[starts], starts
