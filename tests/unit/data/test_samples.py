"""Samples: structure of each, statistics over many, everything from one seed.

Documents here are made so that a token tells where it comes from: document d, sentence s, word w is one number. What a
sample holds can then be compared with the text.
"""

from __future__ import annotations

import math
import random
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest

from bert_fast.data.samples import Sample, SampleParams, make_samples
from bert_fast.data.wordpiece import Vocabulary
from bert_fast.errors import UserError

NUM_SPECIAL = 5
CLS, SEP, MASK = 2, 3, 4
VOCABULARY = Vocabulary(tuple(str(n) for n in range(60_000)), "0" * 64, CLS, SEP, MASK)
PARAMS = SampleParams(max_seq_len=64, max_predictions=20, dupe_factor=4, seed=3)


def text(num_documents: int, seed: int = 0) -> list[list[list[int]]]:
    """Documents of sentences whose tokens count up from NUM_SPECIAL over the whole text, so that all are different."""
    rng = random.Random(seed)
    token = NUM_SPECIAL
    documents = []
    for _ in range(num_documents):
        document = []
        for _ in range(rng.randint(6, 20)):
            length = rng.randint(3, 15)
            document.append(list(range(token, token + length)))
            token += length
        documents.append(document)
    assert token < len(VOCABULARY)
    return documents


DOCUMENTS = text(150)
DOCUMENT_OF = {token: d for d, document in enumerate(DOCUMENTS) for sentence in document for token in sentence}
LAST_OF_SENTENCE = {sentence[-1] for document in DOCUMENTS for sentence in document}


@pytest.fixture(scope="module")
def samples() -> list[Sample]:
    return list(make_samples(DOCUMENTS, VOCABULARY, PARAMS, chunk=0))


def original(sample: Sample) -> np.ndarray:
    """The tokens before masking."""
    ids = sample.input_ids.copy()
    ids[sample.masked_positions] = sample.masked_labels
    return ids


def same(a: Sample, b: Sample) -> bool:
    return (
        np.array_equal(a.input_ids, b.input_ids)
        and np.array_equal(a.masked_positions, b.masked_positions)
        and np.array_equal(a.masked_labels, b.masked_labels)
        and (a.len_a, a.is_random_next) == (b.len_a, b.is_random_next)
    )


def within(share: float, expected: float, count: int, sigmas: float = 5.0) -> bool:
    return abs(share - expected) < sigmas * math.sqrt(expected * (1 - expected) / count)


# ---- structure ------------------------------------------------------------------------------------------------------


def test_every_sample_is_cls_a_sep_b_sep(samples: list[Sample]) -> None:
    for sample in samples:
        ids = original(sample)
        assert ids[0] == CLS
        assert ids[sample.len_a - 1] == SEP
        assert ids[-1] == SEP
        assert (ids == CLS).sum() == 1
        assert (ids == SEP).sum() == 2
        assert sample.len_a >= 3, "A holds a token"
        assert len(ids) - sample.len_a >= 2, "B holds a token"


def test_special_tokens_are_never_masked(samples: list[Sample]) -> None:
    for sample in samples:
        ids = sample.input_ids
        assert (ids[0], ids[sample.len_a - 1], ids[-1]) == (CLS, SEP, SEP)
        forbidden = {0, sample.len_a - 1, len(ids) - 1}
        assert not forbidden & set(sample.masked_positions.tolist())
        assert not {CLS, SEP, MASK} & set(sample.masked_labels.tolist())


def test_lengths_stay_below_the_maximum_and_mostly_reach_it(samples: list[Sample]) -> None:
    lengths = np.array([len(s.input_ids) for s in samples])
    assert lengths.max() == PARAMS.max_seq_len
    assert lengths.min() >= 5
    assert np.mean(lengths == PARAMS.max_seq_len) > 0.5


def test_segments_are_runs_of_the_text(samples: list[Sample]) -> None:
    """Tokens of the text count up, so a segment of consecutive sentences (cut at its ends) counts up by one."""
    for sample in samples:
        ids = original(sample).astype(np.int64)
        segment_a, segment_b = ids[1 : sample.len_a - 1], ids[sample.len_a : -1]
        for segment in (segment_a, segment_b):
            assert (np.diff(segment) == 1).all()
            assert len({DOCUMENT_OF[token] for token in segment.tolist()}) == 1


def test_is_random_next_says_whether_b_comes_from_another_document(samples: list[Sample]) -> None:
    for sample in samples:
        ids = original(sample).astype(np.int64)
        last_a, first_b = int(ids[sample.len_a - 2]), int(ids[sample.len_a])
        if sample.is_random_next:
            assert DOCUMENT_OF[last_a] != DOCUMENT_OF[first_b]
        else:
            assert DOCUMENT_OF[last_a] == DOCUMENT_OF[first_b]
            assert last_a < first_b


def test_b_follows_a_where_nothing_was_trimmed(samples: list[Sample]) -> None:
    short = [s for s in samples if not s.is_random_next and len(s.input_ids) < PARAMS.max_seq_len]
    assert len(short) > 50
    for sample in short:
        ids = original(sample).astype(np.int64)
        assert ids[sample.len_a] == ids[sample.len_a - 2] + 1
        assert int(ids[sample.len_a - 2]) in LAST_OF_SENTENCE, "A ends where a sentence ends"


def test_types_and_order(samples: list[Sample]) -> None:
    for sample in samples[:200]:
        assert sample.input_ids.dtype == sample.masked_positions.dtype == sample.masked_labels.dtype == np.uint16
        assert (np.diff(sample.masked_positions.astype(int)) > 0).all()
        assert len(sample.masked_positions) == len(sample.masked_labels)
        assert sample.is_random_next in (0, 1)


# ---- masks ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "params",
    [
        PARAMS,
        SampleParams(max_seq_len=64, max_predictions=5, dupe_factor=1),
        SampleParams(max_seq_len=16, max_predictions=76, mask_prob=0.15, dupe_factor=1),
        SampleParams(max_seq_len=16, max_predictions=76, mask_prob=0.99, short_seq_prob=0.5, dupe_factor=1),
    ],
    ids=["default", "few", "short", "all"],
)
def test_number_of_masks(params: SampleParams) -> None:
    """15 % of the length with its special tokens, rounded; at least 1, at most max_predictions and what can be masked."""
    for sample in make_samples(DOCUMENTS[:40], VOCABULARY, params, chunk=0):
        length = len(sample.input_ids)
        wanted = max(1, round(length * params.mask_prob))
        assert len(sample.masked_positions) == min(wanted, params.max_predictions, length - 3)


def test_fifteen_percent_of_tokens_are_masked(samples: list[Sample]) -> None:
    masked = sum(len(s.masked_positions) for s in samples)
    tokens = sum(len(s.input_ids) for s in samples)
    assert masked / tokens == pytest.approx(0.15, abs=0.01)


def test_eighty_ten_ten(samples: list[Sample]) -> None:
    outcome: Counter[str] = Counter()
    for sample in samples:
        for seen, label in zip(
            sample.input_ids[sample.masked_positions].tolist(), sample.masked_labels.tolist(), strict=True
        ):
            outcome["mask" if seen == MASK else "kept" if seen == label else "random"] += 1
    count = outcome.total()
    assert count > 10_000
    assert within(outcome["mask"] / count, 0.8, count)
    assert within(outcome["kept"] / count, 0.1, count)
    assert within(outcome["random"] / count, 0.1, count)


def test_random_tokens_are_drawn_from_the_whole_vocabulary(samples: list[Sample]) -> None:
    drawn = np.array(
        [
            seen
            for s in samples
            for seen, label in zip(s.input_ids[s.masked_positions].tolist(), s.masked_labels.tolist(), strict=True)
            if seen not in (MASK, label)
        ]
    )
    quarters = np.bincount(drawn * 4 // len(VOCABULARY), minlength=4) / len(drawn)
    assert all(within(share, 0.25, len(drawn)) for share in quarters), quarters


def test_every_place_is_equally_likely_to_be_masked() -> None:
    params = SampleParams(max_seq_len=23, max_predictions=76, short_seq_prob=0.0, dupe_factor=30)
    hits, chances = Counter[int](), Counter[int]()
    for sample in make_samples(DOCUMENTS[:60], VOCABULARY, params, chunk=0):
        if len(sample.input_ids) == 23:
            hits.update(sample.masked_positions.tolist())
            chances.update(set(range(1, 22)) - {sample.len_a - 1})
    assert min(chances.values()) > 1000
    for place in range(1, 22):
        assert within(hits[place] / chances[place], round(23 * 0.15) / 20, chances[place]), place


def test_labels_are_the_original_tokens(samples: list[Sample]) -> None:
    """Putting the labels back gives runs of the text (structure tests); everywhere else the text was left alone."""
    changed = 0
    for sample in samples:
        ids = original(sample).astype(np.int64)
        changed += int((sample.input_ids != ids).sum())
        untouched = np.setdiff1d(np.arange(len(ids)), sample.masked_positions)
        assert (sample.input_ids[untouched] == ids[untouched]).all()
        assert all(label in DOCUMENT_OF for label in sample.masked_labels.tolist())
    assert changed > 5000


# ---- pairs ----------------------------------------------------------------------------------------------------------


def test_about_half_of_the_next_sentences_are_random(samples: list[Sample]) -> None:
    """A little more than half: a document's last sentence alone has no B of its own."""
    assert len(samples) > 1500
    share = sum(s.is_random_next for s in samples) / len(samples)
    assert 0.45 < share < 0.62


def test_a_lone_sentence_is_always_followed_by_a_random_one() -> None:
    documents = [[sentence] for document in DOCUMENTS[:30] for sentence in document]
    made = list(make_samples(documents, VOCABULARY, PARAMS, chunk=0))
    assert len(made) == len(documents) * PARAMS.dupe_factor
    assert all(s.is_random_next for s in made)


def test_a_lone_document_is_its_own_other_document() -> None:
    document = [list(range(NUM_SPECIAL + 5 * n, NUM_SPECIAL + 5 * n + 5)) for n in range(2000)]
    made = list(make_samples([document], VOCABULARY, PARAMS, chunk=0))
    assert 0.45 < np.mean([s.is_random_next for s in made]) < 0.6
    follows = [
        int(ids[s.len_a]) - int(ids[s.len_a - 2]) for s in made if s.is_random_next for ids in [original(s).astype(int)]
    ]
    assert np.mean([0 < step < 100 for step in follows]) < 0.05, "B is text of another place"


def test_the_other_document_comes_from_the_whole_split() -> None:
    """Of a chunk of the documents samples are made; their random B comes from all, as often from each."""
    chunk = range(10, 20)
    made = list(make_samples(DOCUMENTS, VOCABULARY, replace(PARAMS, dupe_factor=100), 0, chunk))
    ids = [original(sample).astype(np.int64) for sample in made]
    assert {DOCUMENT_OF[int(i[1])] for i in ids} == set(chunk)
    others = Counter(DOCUMENT_OF[int(i[-2])] for i, s in zip(ids, made, strict=True) if s.is_random_next)
    assert len(others) == len(DOCUMENTS)
    count = others.total()
    inside = sum(others[document] for document in chunk) / count
    assert within(inside, 9 / 149, count), "one of the other nine of its chunk, no more often than any"


def test_chunks_of_a_split_together_give_all_its_samples() -> None:
    whole = len(list(make_samples(DOCUMENTS, VOCABULARY, PARAMS, chunk=0)))
    parts = [list(make_samples(DOCUMENTS, VOCABULARY, PARAMS, n, range(50 * n, 50 * n + 50))) for n in range(3)]
    assert sum(map(len, parts)) == pytest.approx(whole, rel=0.05)
    assert not any(same(a, b) for a, b in zip(parts[0], parts[1], strict=False))


def test_a_lone_document_of_one_sentence_gives_nothing() -> None:
    assert list(make_samples([[[7, 8, 9]]], VOCABULARY, PARAMS, chunk=0)) == []
    assert list(make_samples([], VOCABULARY, PARAMS, chunk=0)) == []
    assert list(make_samples([[], []], VOCABULARY, PARAMS, chunk=0)) == []


def test_sentences_that_b_did_not_take_are_used_again(samples: list[Sample]) -> None:
    """With random B the rest of what was gathered goes back: all text is seen in every pass."""
    params = SampleParams(max_seq_len=64, max_predictions=20, short_seq_prob=0.0, dupe_factor=1)
    seen: set[int] = set()
    for sample in make_samples(DOCUMENTS, VOCABULARY, params, chunk=0):
        ids = original(sample)
        seen.update(ids[1 : sample.len_a - 1].tolist())
        if not sample.is_random_next:
            seen.update(ids[sample.len_a : -1].tolist())
    total = sum(len(sentence) for document in DOCUMENTS for sentence in document)
    assert len(seen & set(DOCUMENT_OF)) / total > 0.85  # the rest was trimmed off


@pytest.mark.parametrize("seed", range(20))
def test_a_document_has_one_target_length_a_pass(seed: int) -> None:
    """400 sentences of 20 tokens, all short on purpose: all samples but the last have one length, of whole sentences."""
    document = [list(range(NUM_SPECIAL + 20 * n, NUM_SPECIAL + 20 * n + 20)) for n in range(400)]
    params = SampleParams(short_seq_prob=1.0, dupe_factor=1, seed=seed)
    lengths = [len(s.input_ids) for s in make_samples([document], VOCABULARY, params, chunk=0)]
    assert len(lengths) > 15
    assert len(set(lengths[:-1])) == 1, lengths
    assert lengths[0] == 512 or lengths[0] % 20 == 3


@pytest.mark.parametrize("probability", [0.0, 0.1, 1.0])
def test_share_of_documents_made_short(probability: float) -> None:
    """With `short_seq_prob` the target is uniform in [2, max - 3]; long documents otherwise fill the length."""
    document = [list(range(NUM_SPECIAL + 2 * n, NUM_SPECIAL + 2 * n + 2)) for n in range(300)]
    params = SampleParams(max_seq_len=64, short_seq_prob=probability, dupe_factor=1)
    firsts = [
        len(next(make_samples([document], VOCABULARY, replace(params, seed=seed), chunk=0)).input_ids)
        for seed in range(1000)
    ]
    # Sentences of two tokens: a target of 60 or 61 gathers 60 or 62 and fills the sample.
    expected = probability * len(range(2, 59)) / len(range(2, 62))
    assert abs(np.mean([n < 62 for n in firsts]) - expected) <= 5 * math.sqrt(expected * (1 - expected) / 1000)


def test_every_pass_draws_the_target_again() -> None:
    document = [list(range(NUM_SPECIAL + 2 * n, NUM_SPECIAL + 2 * n + 2)) for n in range(500)]
    params = SampleParams(max_seq_len=64, short_seq_prob=1.0, dupe_factor=20)
    lengths = Counter(len(s.input_ids) for s in make_samples([document], VOCABULARY, params, chunk=0))
    assert sum(count > 10 for count in lengths.values()) > 8


def test_trimming_takes_from_both_ends_of_the_longer_segment() -> None:
    first, second = list(range(10, 49)), list(range(1000, 1039))
    params = SampleParams(max_seq_len=43, max_predictions=1, short_seq_prob=0.0, dupe_factor=400)
    fronts, lengths = [], set()
    for sample in make_samples([[first, second]], VOCABULARY, params, chunk=0):
        if sample.is_random_next:
            continue
        ids = original(sample).astype(np.int64)
        lengths.add((sample.len_a - 2, len(ids) - sample.len_a - 1))
        fronts.append(int(ids[1]) - 10)
    assert lengths == {(20, 20)}, "equal long segments end equally long"
    assert len(fronts) > 150
    assert np.mean(fronts) == pytest.approx(9.5, abs=1.0), "half of the 19 tokens too many go at the front"


@pytest.mark.parametrize(
    ("values", "flag"),
    [
        ({"max_seq_len": 4}, "--max-seq-len 4"),
        ({"max_seq_len": 65536}, "--max-seq-len 65536"),
        ({"short_seq_prob": math.nan}, "--short-seq-prob"),
        ({"max_predictions": 0}, "--max-predictions"),
        ({"dupe_factor": 0}, "--dupe-factor"),
        ({"mask_prob": 0.0}, "--mask-prob"),
        ({"mask_prob": 1.0}, "--mask-prob"),
        ({"short_seq_prob": 1.5}, "--short-seq-prob"),
    ],
)
def test_parameters_that_make_no_sample_are_refused(values: dict[str, float], flag: str) -> None:
    with pytest.raises(UserError, match=flag):
        SampleParams(**values)  # type: ignore[arg-type]


def test_the_shortest_sample_is_five_tokens() -> None:
    made = list(make_samples(DOCUMENTS[:5], VOCABULARY, SampleParams(5, 1, dupe_factor=1), chunk=0))
    assert made
    assert {len(s.input_ids) for s in made} == {5}


# ---- determinism ----------------------------------------------------------------------------------------------------


def test_same_seed_and_chunk_give_the_same_samples(samples: list[Sample]) -> None:
    again = list(make_samples(DOCUMENTS, VOCABULARY, PARAMS, chunk=0))
    assert len(again) == len(samples)
    assert all(same(a, b) for a, b in zip(samples, again, strict=True))


@pytest.mark.parametrize("change", ["chunk", "seed"])
def test_another_seed_or_chunk_gives_others(samples: list[Sample], change: str) -> None:
    params = SampleParams(64, 20, dupe_factor=4, seed=4 if change == "seed" else 3)
    others = list(make_samples(DOCUMENTS, VOCABULARY, params, chunk=1 if change == "chunk" else 0))
    equal = sum(same(a, b) for a, b in zip(samples, others, strict=False))
    assert equal < len(samples) / 100


@pytest.mark.parametrize("change", ["chunk", "seed", "pass"])
def test_masks_have_a_stream_of_their_own_in_every_chunk_and_pass(change: str) -> None:
    """Not only the text: among samples of equal length, which of their tokens are masked has nothing in common."""
    params = SampleParams(max_seq_len=24, short_seq_prob=0.0, dupe_factor=1, seed=3)
    document = [list(range(NUM_SPECIAL + 3 * n, NUM_SPECIAL + 3 * n + 3)) for n in range(3000)]
    if change == "pass":
        both = list(make_samples([document], VOCABULARY, replace(params, dupe_factor=2), chunk=0))
        first = len(list(make_samples([document], VOCABULARY, params, chunk=0)))
        one, two = both[:first], both[first:]
    else:
        other = replace(params, seed=4 if change == "seed" else 3)
        one = list(make_samples([document], VOCABULARY, params, chunk=0))
        two = list(make_samples([document], VOCABULARY, other, chunk=int(change == "chunk")))

    def chosen(sample: Sample) -> tuple[int, ...]:
        """Masked places counted over the tokens that may be masked."""
        positions = sample.masked_positions.astype(int)
        return tuple(positions - 1 - (positions >= sample.len_a))

    full = [
        (chosen(a), chosen(b)) for a, b in zip(one, two, strict=False) if len(a.input_ids) == len(b.input_ids) == 24
    ]
    assert len(full) > 300
    assert sum(a == b for a, b in full) < len(full) / 50


def test_every_pass_over_the_text_is_a_new_one() -> None:
    one = list(make_samples(DOCUMENTS[:20], VOCABULARY, SampleParams(64, 20, dupe_factor=1, seed=3), chunk=0))
    two = list(make_samples(DOCUMENTS[:20], VOCABULARY, SampleParams(64, 20, dupe_factor=2, seed=3), chunk=0))
    assert all(same(a, b) for a, b in zip(one, two[: len(one)], strict=True)), "passes are independent of their number"
    assert sum(same(a, b) for a, b in zip(one, two[len(one) :], strict=False)) < len(one) / 10


def test_known_sample() -> None:
    """A change of the random stream changes every store: let it be on purpose."""
    made = list(make_samples(DOCUMENTS[:3], VOCABULARY, SampleParams(24, 4, dupe_factor=1, seed=12345), chunk=0))
    assert (made[3].len_a, made[3].is_random_next) == (19, 1)
    assert made[3].masked_positions.tolist() == [1, 13, 17, 21]
    assert made[3].input_ids.tolist() == [
        2, 2300, 94, 95, 96, 97, 98, 99, 100, 101, 102, 103, 104, 4, 106, 107, 108, 4, 3, 341, 342, 4, 344, 3
    ]  # fmt: skip
