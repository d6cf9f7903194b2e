"""Sample creation against a plain statement of the reference algorithm, on the same text: the same statistics.

The statement works on lists of words and follows the published description step by step, with its own random numbers.
"""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest

from bert_fast.data.samples import SampleParams, make_samples
from bert_fast.data.wordpiece import Vocabulary

PARAMS = SampleParams(max_seq_len=128, max_predictions=20, dupe_factor=10, seed=12345)


def reference(documents: list[list[list[int]]], params: SampleParams, vocabulary: Vocabulary) -> list[dict[str, Any]]:
    rng = random.Random(99)
    out = []
    for _ in range(params.dupe_factor):
        for number, document in enumerate(documents):
            most = params.max_seq_len - 3
            target = rng.randint(2, most) if rng.random() < params.short_seq_prob else most
            chunk: list[list[int]] = []
            i = 0
            while i < len(document):
                chunk.append(document[i])
                if i == len(document) - 1 or sum(map(len, chunk)) >= target:
                    end_a = rng.randint(1, len(chunk) - 1) if len(chunk) >= 2 else 1
                    a = [token for sentence in chunk[:end_a] for token in sentence]
                    b: list[int] = []
                    random_next = len(chunk) == 1 or rng.random() < 0.5
                    if random_next:
                        other = number
                        while other == number:
                            other = rng.randint(0, len(documents) - 1)
                        start = rng.randint(0, len(documents[other]) - 1)
                        for sentence in documents[other][start:]:
                            b += sentence
                            if len(b) >= target - len(a):
                                break
                        i -= len(chunk) - end_a
                    else:
                        b = [token for sentence in chunk[end_a:] for token in sentence]
                    while len(a) + len(b) > most:
                        longer = a if len(a) > len(b) else b
                        longer.pop(0 if rng.random() < 0.5 else -1)
                    out.append(mask(a, b, random_next, params, vocabulary, rng))
                    chunk = []
                    target = rng.randint(2, most) if rng.random() < params.short_seq_prob else most
                i += 1
    return out


def mask(
    a: list[int], b: list[int], random_next: bool, params: SampleParams, vocabulary: Vocabulary, rng: random.Random
) -> dict[str, Any]:
    tokens = [vocabulary.cls_id, *a, vocabulary.sep_id, *b, vocabulary.sep_id]
    places = [n for n, token in enumerate(tokens) if token not in (vocabulary.cls_id, vocabulary.sep_id)]
    rng.shuffle(places)
    count = min(params.max_predictions, max(1, round(len(tokens) * params.mask_prob)))
    kinds = []
    for place in sorted(places[:count]):
        original = tokens[place]
        if rng.random() < 0.8:
            tokens[place] = vocabulary.mask_id
        elif rng.random() >= 0.5:
            tokens[place] = rng.randint(0, len(vocabulary) - 1)
        kinds.append(
            "mask" if tokens[place] == vocabulary.mask_id else "kept" if tokens[place] == original else "other"
        )
    return {"length": len(tokens), "len_a": len(a) + 2, "random": random_next, "kinds": kinds}


@pytest.fixture(scope="module")
def both(vocabulary: Vocabulary) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    rng = random.Random(5)
    low = vocabulary.mask_id + 1
    documents = [
        [[rng.randrange(low, len(vocabulary)) for _ in range(rng.randint(3, 40))] for _ in range(rng.randint(1, 60))]
        for _ in range(150)
    ]
    theirs = reference(documents, PARAMS, vocabulary)
    ours = []
    for sample in make_samples(documents, vocabulary, PARAMS, 0):
        new = sample.input_ids[sample.masked_positions]
        kinds = np.where(
            new == vocabulary.mask_id, "mask", np.where(new == sample.masked_labels, "kept", "other")
        ).tolist()
        ours.append(
            {
                "length": len(sample.input_ids),
                "len_a": sample.len_a,
                "random": bool(sample.is_random_next),
                "kinds": kinds,
            }
        )
    return ours, theirs


def compare(ours: float, theirs: float, spread: float, counts: tuple[int, int]) -> None:
    """Two means of `counts` samples with the same spread differ by less than five standard errors."""
    assert abs(ours - theirs) < 5 * spread * (1 / counts[0] + 1 / counts[1]) ** 0.5


def test_the_same_number_of_samples(both: Any) -> None:
    ours, theirs = both
    assert len(ours) == pytest.approx(len(theirs), rel=0.02)


@pytest.mark.parametrize(
    ("name", "of"),
    [
        ("random next", lambda s: float(s["random"])),
        ("full length", lambda s: float(s["length"] == PARAMS.max_seq_len)),
        ("short", lambda s: float(s["length"] < PARAMS.max_seq_len // 2)),
        ("length", lambda s: float(s["length"])),
        ("first segment", lambda s: float(s["len_a"])),
        ("masks", lambda s: float(len(s["kinds"]))),
    ],
)
def test_statistics_agree(both: Any, name: str, of: Any) -> None:
    ours, theirs = ([of(sample) for sample in samples] for samples in both)
    compare(np.mean(ours), np.mean(theirs), np.std(theirs), (len(ours), len(theirs)))


@pytest.mark.parametrize("kind", ["mask", "kept", "other"])
def test_replacements_agree(both: Any, kind: str) -> None:
    ours, theirs = ([k == kind for sample in samples for k in sample["kinds"]] for samples in both)
    compare(np.mean(ours), np.mean(theirs), np.std(theirs), (len(ours), len(theirs)))


def test_length_histograms_agree(both: Any) -> None:
    """Chi-squared of two histograms over bins of eight tokens: below 30 for 16 bins (p about 0.01)."""
    edges = np.arange(0, 137, 8)
    a, b = (np.histogram([s["length"] for s in samples], edges)[0].astype(float) for samples in both)
    used = a + b > 0
    scale = (b.sum() / a.sum()) ** 0.5
    statistic = float((((a * scale - b / scale) ** 2)[used] / (a + b)[used]).sum())
    assert statistic < 2.2 * used.sum()
