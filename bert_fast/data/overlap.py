"""Is the evaluation store's text also in the training store? From the samples themselves, in about a second.

Samples of one document differ in how they are cut and masked. So masked tokens are put back, and stretches of `_WINDOW`
tokens inside a segment are compared: a sample that is covered to `_ENOUGH` by stretches of the training store was made from
its text. Chance, quotations and licences repeat stretches, but not most of a sample; documents that a collection holds
twice do, and no split by documents tells them apart.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from itertools import pairwise

import numpy as np

from bert_fast.data.batch import Batch
from bert_fast.data.store import Store
from bert_fast.files import write_json
from bert_fast.integers import SPLITMIX64, ceil_div

_WINDOW = 12  # tokens: more than a phrase, less than a short segment
_ENOUGH = 0.7  # of a sample's tokens; the rest may lie beside a cut
_TRAIN_TOKENS, _EVAL_TOKENS = 3_000_000, 500_000  # that are looked at, at most
_PIECES = 64  # of the training store, evenly spread
MOST_SHARED = (
    0.2  # of evaluation samples, in a held-out store: in the documentation of Python packages 14 % are there twice
)


@dataclass(frozen=True)
class Shared:
    """Of `compared` evaluation samples, `found` are of text that the training store has. `looked_at`: share of it read."""

    found: int
    compared: int
    looked_at: float = 1.0

    @property
    def is_held_out(self) -> bool:
        return self.found <= MOST_SHARED * self.compared


def shared_text(train: Store, evaluation: Store, eval_samples: int | None = None) -> Shared:
    """How many of the (first `eval_samples`) evaluation samples are of text in the training store.

    Of a large store a part is read, so that it takes no longer than for a small one. The chance to notice shared text falls
    with that part: of a training store of tens of millions of samples only the same token file is noticed.
    """
    total = min(len(evaluation), eval_samples or len(evaluation))
    if train.manifest["sha256"] == evaluation.manifest["sha256"]:
        return Shared(total, total)
    count = max(1, int(_EVAL_TOKENS / max(1.0, float(np.mean(evaluation.lengths[:total])))))
    ids = np.unique(np.linspace(0, total - 1, min(count, total)).astype(np.int64))
    batch = evaluation.batch(ids, keep_order=True)
    hashes, starts = _stretches(batch)
    theirs, seen = [], 0
    for piece in _pieces(train):
        theirs.append(_stretches(train.batch(piece, keep_order=True))[0])
        seen += len(piece)
    shared = starts[np.isin(hashes, np.concatenate(theirs))]
    covered, could_be = (_covered(each, batch) for each in (shared, starts))
    found = (covered >= _ENOUGH * could_be) & (could_be > 0)
    return Shared(int(found.sum()), int((could_be > 0).sum()), seen / len(train))


def known_shared_text(train: Store, evaluation: Store) -> Shared | None:
    """What the evaluation store's manifest says of this training store; None if it does not."""
    found = evaluation.manifest.get("shared_text")
    if not isinstance(found, dict) or found.get("train_sha256") != train.manifest["sha256"]:
        return None
    return Shared(int(found["found"]), int(found["compared"]), float(found["looked_at"]))


def note_shared_text(train: Store, evaluation: Store) -> Shared:
    """Compare two stores and write the outcome into the evaluation store's manifest, unless it is there."""
    shared = known_shared_text(train, evaluation)
    if shared is None:
        shared = shared_text(train, evaluation)
        note = {"train_sha256": train.manifest["sha256"], **asdict(shared)}
        write_json(evaluation.folder / "manifest.json", {**evaluation.manifest, "shared_text": note})
    return shared


def _covered(starts: np.ndarray, batch: Batch) -> np.ndarray:
    """Tokens of every sample that lie in stretches from these places, int64 [B]."""
    changes = np.zeros(batch.num_tokens + 1, np.int64)
    changes[starts] += 1
    changes[starts + _WINDOW] -= 1
    running = np.concatenate([[0], np.cumsum(np.cumsum(changes)[:-1] > 0)])
    return running[batch.cu_seqlens[1:]] - running[batch.cu_seqlens[:-1]]


def _pieces(store: Store) -> list[np.ndarray]:
    """Ids of neighbouring samples, from evenly spread places: the whole of a small store."""
    mean = max(1.0, float(store.manifest.get("mean_length") or store.lengths.mean()))
    count = min(len(store), max(1, int(_TRAIN_TOKENS / mean)))
    pieces = min(_PIECES, count)
    starts = np.linspace(0, len(store), pieces + 1).astype(np.int64)
    return [np.arange(a, min(b, a + ceil_div(count, pieces))) for a, b in pairwise(starts)]


def _stretches(batch: Batch) -> tuple[np.ndarray, np.ndarray]:
    """Hash of every stretch of tokens inside a segment (uint64 [n]) and where in the batch it starts (int64 [n])."""
    tokens = batch.input_ids.astype(np.uint64)
    tokens[batch.masked_positions] = batch.masked_labels.astype(np.uint64)
    is_end = np.zeros(len(tokens) + 1, np.int64)  # [CLS] and [SEP]: no stretch holds one
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
