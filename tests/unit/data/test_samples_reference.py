"""Sample creation against the published generator, on the same text: the same statistics.

Twice: against a plain statement of the algorithm, which works on lists of words with its own random numbers; and against
what the generator itself made, with which nothing of ours had to do. `tests/golden/generator/expected.npz` is of MLCommons'
generator (TensorFlow BERT reference, run unmodified: 512 tokens, 76 predictions, probability 0.15, 10 passes, short
sequences 0.1, seed 12345) on two texts, Wikipedia articles it ships (`wiki`, 152) and the same sentences cut to articles of
Wikipedia's usual size (`short`, 2,134): tokens of each sentence, sentences of each document, and of its samples how many
have each length. Samples of one document and pass share their target length, so that the spread of a figure is that of
whole runs with other seeds, not that of independent samples.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from scipy.stats import ks_2samp
from support.paths import ROOT

from bert_fast.data.samples import SampleParams, make_samples, segment_pairs
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
        [[rng.randrange(low, len(vocabulary)) for _ in range(rng.randint(3, 40))] for _ in range(rng.randint(1, 12))]
        for _ in range(400)  # short ones: the samples of a long one are alike
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


# ---- the generator's own samples ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def published() -> dict[str, np.ndarray]:
    with np.load(ROOT / "tests" / "golden" / "generator" / "expected.npz") as loaded:
        return dict(loaded)


def documents_of(published: dict[str, np.ndarray], text: str) -> list[list[list[int]]]:
    """Documents of the text's numbers of sentences and tokens. Which tokens they are does not matter."""
    sentences = iter([[9] * int(length) for length in published["sentences"]])
    return [[next(sentences) for _ in range(int(count))] for count in published[f"{text}_documents"]]


@pytest.fixture
def run() -> Callable[..., np.ndarray]:
    """`run(documents, seed)`: one row per sample: length, tokens of A with [CLS] and [SEP], random next. Makes no masks."""

    def rows(documents: list[list[list[int]]], seed: int) -> np.ndarray:
        params, chosen = SampleParams(seed=seed), range(len(documents))
        return np.array(
            [
                (len(a) + len(b) + 3, len(a) + 2, is_random)
                for duplicate in range(params.dupe_factor)
                for a, b, is_random in segment_pairs(documents, chosen, params, chunk=0, duplicate=duplicate)
            ]
        )

    return rows


def drawn(published: dict[str, np.ndarray], name: str) -> np.ndarray:
    """The lengths, from how many samples have each."""
    counts = published[name]
    return np.repeat(np.arange(len(counts)), counts)


def test_samples_are_those_of_the_published_generator(published: dict[str, np.ndarray], run: Any) -> None:
    length, len_a, is_random = run(documents_of(published, "short"), SampleParams().seed).T
    theirs, theirs_a = drawn(published, "short_lengths"), drawn(published, "short_lengths_a")
    assert len(length) == pytest.approx(len(theirs), rel=0.005)
    assert length.mean() == pytest.approx(theirs.mean(), rel=0.01)
    assert ks_2samp(length, theirs).pvalue > 0.01
    assert abs(len_a.mean() - theirs_a.mean()) < 3 * theirs_a.std() * (2 / len(theirs)) ** 0.5
    share = published["short_random_next"] / len(theirs)
    assert abs(is_random.mean() - share) < 2 * (2 * share * (1 - share) / len(theirs)) ** 0.5


@pytest.mark.parametrize("text", ["short", "wiki"])
def test_the_published_samples_have_our_number_of_masks(published: dict[str, np.ndarray], text: str) -> None:
    """`test_number_of_masks` holds ours to the same rule."""
    lengths = drawn(published, f"{text}_lengths")
    assert int(np.clip(np.rint(0.15 * lengths), 1, 76).sum()) == published[f"{text}_masked"]


@pytest.mark.slow
def test_long_documents_agree_over_many_seeds(published: dict[str, np.ndarray], run: Any) -> None:
    """Of 152 articles one seed says little: the number of samples varies by 3 % from seed to seed."""
    documents = documents_of(published, "wiki")
    runs = [run(documents, seed) for seed in range(12)]
    theirs = drawn(published, "wiki_lengths")
    for ours, expected in (
        ([len(each) for each in runs], len(theirs)),
        ([each[:, 0].mean() for each in runs], theirs.mean()),
        ([each[:, 1].mean() for each in runs], drawn(published, "wiki_lengths_a").mean()),
        ([each[:, 2].mean() for each in runs], published["wiki_random_next"] / len(theirs)),
    ):
        assert abs(np.mean(ours) - expected) < 2.5 * np.std(ours, ddof=1)
    assert np.mean([len(each) for each in runs]) == pytest.approx(len(theirs), rel=0.015)
    lengths = np.concatenate([each[:, 0] for each in runs])
    assert ks_2samp(lengths, theirs).pvalue > 0.01
