"""Checks that a store looks like BERT's samples, by statistics of its tables and of records from all over it.

The tables (lengths, numbers of masks) are read whole. Of the records at most `most_samples` are read, in runs spread evenly
over the store, so that the time hardly grows with the store.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from bert_fast.data.batch import Batch
from bert_fast.data.record import read_headers, sections_of
from bert_fast.data.samples import num_to_predict
from bert_fast.data.store import Store
from bert_fast.data.wordpiece import Vocabulary
from bert_fast.errors import UserError
from bert_fast.integers import SPLITMIX64, mix64, segment_ids, segment_ranges

_STRETCH = 1000  # samples read together
_WINDOW = 32  # consecutive samples whose lengths are a fingerprint
_FEWEST_SHORT = 30  # documents made short, half of them below half the longest length
_SEED = 0


@dataclass(frozen=True)
class Finding:
    """One check: what was found, what was expected, and whether it passed."""

    name: str
    found: str
    expected: str
    passed: bool


@dataclass(frozen=True)
class Expectation:
    """The parameters of a store's samples. Defaults are MLPerf's, for fields that its manifest does not have."""

    max_seq_len: int = 512
    max_predictions: int = 76
    mask_prob: float = 0.15
    short_seq_prob: float = 0.1
    num_draws: int | None = None  # of target lengths: one per document and pass

    @classmethod
    def of_manifest(cls, manifest: dict[str, Any]) -> Expectation:
        """The parameters in a store's manifest."""
        params = manifest.get("params") or {}
        known = {name: params[name] for name in cls.__dataclass_fields__ if name in params}
        if "documents" in manifest and "dupe_factor" in params:
            known["num_draws"] = manifest["documents"] * params["dupe_factor"]
        return cls(**known)

    def short_share(self) -> tuple[float, float]:
        """The least and the largest share of samples shorter than half `max_seq_len`. Few long documents may give any share."""
        if self.num_draws is not None and self.num_draws * self.short_seq_prob < _FEWEST_SHORT:
            return 0.0, 1.0
        return 0.4 * self.short_seq_prob, 0.9

    def full_length(self) -> int | None:
        """The length that all samples of a run may have, if any: samples of a long document in its order are full."""
        return self.max_seq_len if self.num_draws is not None else None


def verify_store(store: Store, vocabulary: Vocabulary | None, most_samples: int = 200_000) -> list[Finding]:
    """Check a store. Of one of pairs, what is true of all stores: the vocabulary and the headers of records.

    Args:
        vocabulary: the one that it should have been made with, if known.
        most_samples: whose records are read.

    Returns:
        One finding per check, failed ones included. Nothing is raised for a store that looks wrong.
    """
    expected = Expectation.of_manifest(store.manifest)
    are_samples = store.manifest.get("kind", Store.kind) == Store.kind
    findings = [*_check_tables(store, expected)] if are_samples else []
    if vocabulary is not None:
        own = store.manifest["vocab_sha256"]
        findings.append(Finding("vocabulary", own[:16], vocabulary.sha256[:16], own == vocabulary.sha256))
    bad = damaged_records(store, stretches(len(store), most_samples))
    findings.append(Finding("headers of records", f"{bad:,} do not fit the tables", "0", bad == 0))
    if bad == 0 and are_samples:  # otherwise nothing in them can be trusted
        findings += _check_records(store, expected, vocabulary, most_samples)
    return findings


def damaged_records(store: Store, places: list[tuple[int, int]]) -> int:
    """Number of records in these ranges of samples whose header or positions do not agree with the tables."""
    bad = 0
    for begin, end in places:
        records, starts = store.records(begin, end)
        lengths, masked = (np.asarray(table[begin:end]).astype(np.int64) for table in (store.lengths, store.num_masked))
        len_a, count, label = read_headers(records, starts)
        bad += int(((count != masked) | (label > 1) | (len_a < 1) | (len_a > lengths)).sum())
        owner = segment_ids(masked)
        positions = records[segment_ranges(sections_of(starts, masked).positions, masked)]
        bad += len(np.unique(owner[positions >= lengths[owner]]))
    return bad


def stretches(total: int, most_samples: int) -> list[tuple[int, int]]:
    """First and end of the runs of samples that are read: all of a small store, else spread evenly over it."""
    if total <= most_samples:
        return [(begin, min(total, begin + _STRETCH)) for begin in range(0, total, _STRETCH)]
    size = min(_STRETCH, max(1, most_samples))
    number = max(1, most_samples // size)
    rng = np.random.default_rng(_SEED)
    width = total / number
    begins = np.arange(number) * width + rng.random(number) * max(0.0, width - size)
    return [(begin, begin + size) for begin in begins.astype(int).tolist()]


# ---- tables ---------------------------------------------------------------------------------------------------------


def _check_tables(store: Store, expected: Expectation) -> Iterator[Finding]:
    lengths, masked = np.asarray(store.lengths), np.asarray(store.num_masked)
    longest, shortest = int(lengths.max()), int(lengths.min())
    yield Finding(
        "lengths",
        f"{shortest} to {longest}, mean {lengths.mean():.0f}",
        f"5 to {expected.max_seq_len}, not all alike",
        shortest >= 5 and longest <= expected.max_seq_len and (len(lengths) < 100 or shortest < longest),
    )
    # Samples that are short on purpose are uniform between 2 and the longest; those at the end of a document are short, too.
    short = float((lengths < expected.max_seq_len // 2).mean())
    least, most = expected.short_share()
    yield Finding("share below half the longest", f"{short:.3f}", f"{least:.3f} to {most}", least <= short <= most)
    off = int((masked != num_to_predict(lengths, expected.mask_prob, expected.max_predictions)).sum())
    yield Finding(
        "number of masks",
        f"{off:,} samples differ",
        f"min({expected.max_predictions}, {expected.mask_prob:g} L) of each",
        off <= 1e-4 * len(lengths),
    )
    repeated = repeated_stretches(lengths)
    # A file that was imported twice
    yield Finding("stretches that occur twice", f"{repeated:,}", "0", repeated == 0)


def repeated_stretches(lengths: np.ndarray) -> int:
    """Runs of `_WINDOW` samples whose lengths occur again, in the same order, elsewhere in the table.

    A hash of the content selects which windows are compared (1 in 16), so that copies are found wherever they are. Windows with
    few different lengths say nothing and are left out.
    """
    kept: list[np.ndarray] = []
    size = 1 << 20
    with np.errstate(over="ignore"):
        weights = SPLITMIX64[0] ** np.arange(_WINDOW, dtype=np.uint64)
        for begin in range(0, max(0, len(lengths) - _WINDOW + 1), size):
            piece = lengths[begin : begin + size + _WINDOW - 1].astype(np.uint64)
            count = len(piece) - _WINDOW + 1
            hashes, changes = np.zeros(count, np.uint64), np.zeros(count, np.int16)
            for offset in range(_WINDOW):
                hashes += (piece[offset : offset + count] + np.uint64(1)) * weights[offset]
                if offset:
                    changes += piece[offset : offset + count] != piece[offset - 1 : offset - 1 + count]
            hashes ^= hashes >> np.uint64(29)
            hashes *= SPLITMIX64[1]
            kept.append(hashes[(changes >= _WINDOW // 2) & (hashes >> np.uint64(60) == 0)])
    every = np.concatenate([*kept, np.zeros(0, np.uint64)])
    return len(every) - len(np.unique(every))


# ---- records --------------------------------------------------------------------------------------------------------


class _Sums:
    """Counts over all records that were read."""

    def __init__(self) -> None:
        self.samples = self.masks = self.tokens = self.masked = self.kept = self.random_next = 0
        self.stray_masks = self.unknown = self.badly_framed = self.out_of_range = 0
        self.highest = 0
        self.hashes: list[np.ndarray] = []
        self.constant: list[int] = []  # first samples of runs whose samples are all alike


def _check_records(
    store: Store, expected: Expectation, vocabulary: Vocabulary | None, most_samples: int
) -> Iterator[Finding]:
    sums = _Sums()
    special = _special_ids(store, vocabulary)
    for begin, end in stretches(len(store), most_samples):
        _count(sums, store.batch(np.arange(begin, end), keep_order=True), special, begin, expected.full_length())
    size = store.manifest["vocab_size"]
    yield Finding(
        "token ids",
        f"up to {sums.highest:,}",
        f"below {size:,} and most of them used",
        sums.highest < size and (sums.samples < 10_000 or sums.highest > size // 2),
    )
    yield Finding(
        "[CLS] A [SEP] B [SEP]",
        f"{sums.badly_framed:,} of {sums.samples:,} otherwise",
        "0: else another vocabulary",
        sums.badly_framed == 0,
    )
    unknown = sums.unknown / max(1, sums.tokens)
    yield Finding("share of [UNK]", f"{unknown:.4f}", "below 0.05: else another vocabulary", unknown < 0.05)
    for name, count, share in (
        ("masks that are [MASK]", sums.masked, 0.8),
        ("masks that kept their token", sums.kept, 0.1),
        ("masks with a random token", sums.masks - sums.masked - sums.kept, 0.1),
    ):
        yield _share(name, count, sums.masks, share)
    few = (
        sums.samples // 1000
    )  # a text about BERT can contain these words, and some tokenizers turn them into special ids
    yield Finding(
        "[MASK] where nothing is predicted", f"{sums.stray_masks:,}", f"at most {few:,}", sums.stray_masks <= few
    )
    yield Finding("masks on [CLS], [SEP]", f"{sums.out_of_range:,}", f"at most {few:,}", sums.out_of_range <= few)
    next_share = sums.random_next / max(1, sums.samples)
    slack = 2.5 / math.sqrt(max(1, sums.samples))  # five standard errors
    passed = 0.40 - slack <= next_share <= 0.65 + slack
    yield Finding("share of random next sentences", f"{next_share:.3f}", "0.40 to 0.65", passed)
    hashes = np.concatenate(sums.hashes)
    twice = len(hashes) - len(np.unique(hashes))
    most = 0.001 * len(hashes)  # very short documents can repeat themselves
    yield Finding("samples that occur twice", f"{twice:,} of {len(hashes):,}", f"at most {most:,.0f}", twice <= most)
    where = f"{len(sums.constant):,}" + (f", the first at sample {sums.constant[0]:,}" if sums.constant else "")
    yield Finding("stretches that are constant", where, "0 (one label, one length, or one text)", not sums.constant)


def _special_ids(store: Store, vocabulary: Vocabulary | None) -> tuple[int, int, int, int]:
    """Ids of [CLS], [SEP], [MASK], [UNK]: the vocabulary's, else guessed from the first sample and the commonest mask."""
    if vocabulary is not None:
        return vocabulary.cls_id, vocabulary.sep_id, vocabulary.mask_id, vocabulary.tokens.index("[UNK]")
    batch = store.batch(np.arange(min(len(store), _STRETCH)), keep_order=True)
    values = np.bincount(batch.input_ids[batch.masked_positions])
    first = store[0].input_ids
    return int(first[0]), int(first[-1]), int(values.argmax()), -1


def _count(sums: _Sums, batch: Batch, special: tuple[int, int, int, int], begin: int, full: int | None) -> None:
    cls_id, sep_id, mask_id, unk_id = special
    ids, starts, count = batch.input_ids, batch.cu_seqlens[:-1].astype(np.int64), len(batch.lengths)
    ends = batch.cu_seqlens[1:].astype(np.int64) - 1
    segment_start = np.diff(batch.token_type_ids, prepend=0) == 1
    framed = (ids[starts] == cls_id) & (ids[ends] == sep_id)
    second = np.flatnonzero(segment_start)
    middle_ok = len(second) == count and bool((ids[second - 1] == sep_id).all())
    sums.badly_framed += count - int(framed.sum()) if middle_ok else count
    tokens = ids[batch.masked_positions]
    is_mask = tokens == mask_id
    sums.samples += count
    sums.tokens += len(ids)
    sums.masks += len(tokens)
    sums.masked += int(is_mask.sum())
    sums.kept += int((tokens == batch.masked_labels).sum())
    sums.stray_masks += int((ids == mask_id).sum()) - int(is_mask.sum())
    sums.unknown += int((ids == unk_id).sum())
    sums.out_of_range += int(np.isin(batch.masked_labels, (cls_id, sep_id)).sum())
    sums.highest = max(sums.highest, int(ids.max()), int(batch.masked_labels.max(initial=0)))
    sums.random_next += int((batch.next_sentence_labels == 1).sum())
    hashes = _hashes(ids, starts, batch.position_ids)
    sums.hashes.append(hashes)
    labels = batch.next_sentence_labels
    lengths = set(batch.lengths)
    one_length = len(lengths) == 1 and lengths != {full}
    alike = len(np.unique(hashes)) <= count // 10 or one_length or len(np.unique(labels)) == 1
    if count >= 100 and alike:
        sums.constant.append(begin)


def _hashes(ids: np.ndarray, starts: np.ndarray, positions: np.ndarray) -> np.ndarray:
    """A hash of every sample's tokens and their order, uint64 [B]."""
    with np.errstate(over="ignore"):
        tokens = (ids.astype(np.uint64) + np.uint64(1)) * SPLITMIX64[0]
        places = (positions.astype(np.uint64) + np.uint64(1)) * SPLITMIX64[2]
        return np.add.reduceat(mix64(tokens ^ places), starts)


def _share(name: str, count: int, total: int, expected: float) -> Finding:
    """Check a share of the masks: within five standard errors, plus a hundredth for random tokens that equal the original."""
    share = count / max(1, total)
    slack = 5 * math.sqrt(expected * (1 - expected) / max(1, total)) + 0.01 * (1 - expected)
    return Finding(name, f"{share:.4f}", f"{expected:.2f} ± {slack:.4f}", abs(share - expected) <= slack)


def check_hashes(store: Store) -> Finding:
    """Compare the files with the hashes in the manifest."""
    try:
        store.verify()
    except UserError as error:
        return Finding("bytes", str(error), "as the manifest's hashes", False)
    return Finding("bytes", "unchanged", "as the manifest's hashes", True)
