"""`prepare_data.py verify`: lets a right store through, and names what is wrong with each of a dozen wrong ones."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from bert_fast.data.samples import Sample, SampleParams, make_samples
from bert_fast.data.store import Store, merge_parts, write_part
from bert_fast.data.verify import check_hashes, repeated_stretches, stretches, verify_store
from bert_fast.data.wordpiece import Vocabulary

PARAMS = SampleParams(max_seq_len=64, max_predictions=10, dupe_factor=4, seed=3)
Edit = Callable[[list[Sample], Vocabulary], list[Sample]]


def samples_of(vocabulary: Vocabulary) -> list[Sample]:
    rng = random.Random(0)
    low = vocabulary.mask_id + 1
    documents = [
        [[rng.randrange(low, len(vocabulary)) for _ in range(rng.randint(4, 14))] for _ in range(rng.randint(4, 30))]
        for _ in range(200)
    ]
    return list(make_samples(documents, vocabulary, PARAMS, 0))


@pytest.fixture(scope="module")
def good(vocabulary: Vocabulary) -> list[Sample]:
    return samples_of(vocabulary)


def store_of(samples: list[Sample], vocabulary: Vocabulary, folder: Path) -> Store:
    part = write_part(folder / "part.bin", samples)
    merge_parts(
        folder / "store", [part],
        {"vocab_sha256": vocabulary.sha256, "vocab_size": len(vocabulary), "params": PARAMS.as_dict()},
    )  # fmt: skip
    return Store(folder / "store")


def wrong(store: Store, vocabulary: Vocabulary | None) -> list[str]:
    return [each.name for each in verify_store(store, vocabulary) if not each.passed]


def test_a_right_store_passes(tmp_path: Path, good: list[Sample], vocabulary: Vocabulary) -> None:
    store = store_of(good, vocabulary, tmp_path)
    assert wrong(store, vocabulary) == []
    assert wrong(store, None) == []  # special tokens are told from the samples
    assert check_hashes(store).passed


def masks_kept(samples: list[Sample], vocabulary: Vocabulary) -> list[Sample]:
    out = []
    for sample in samples:
        ids = sample.input_ids.copy()
        ids[sample.masked_positions] = sample.masked_labels
        out.append(replace(sample, input_ids=ids))
    return out


def other_frame(samples: list[Sample], vocabulary: Vocabulary) -> list[Sample]:
    out = []
    for sample in samples:
        ids = sample.input_ids.copy()
        ids[-1] = vocabulary.mask_id + 1
        out.append(replace(sample, input_ids=ids))
    return out


def with_ids(samples: list[Sample], at: int, value: int) -> list[Sample]:
    out = []
    for sample in samples:
        ids = sample.input_ids.copy()
        ids[[n for n in range(1, sample.len_a - 1) if n not in sample.masked_positions][:at]] = value
        out.append(replace(sample, input_ids=ids))
    return out


def one_mask_less(sample: Sample) -> Sample:
    if len(sample.masked_positions) < 2:
        return sample
    return replace(sample, masked_positions=sample.masked_positions[:-1], masked_labels=sample.masked_labels[:-1])


def long_only(samples: list[Sample], vocabulary: Vocabulary) -> list[Sample]:
    return [sample for sample in samples if len(sample.input_ids) == 64]


EDITS: dict[str, tuple[Edit, set[str]]] = {
    "a file twice": (lambda s, v: [*s, *s[500:900]], {"stretches that occur twice", "samples that occur twice"}),
    "a constant shard": (
        lambda s, v: s[:1000] + [s[0]] * 1000 + s[1000:], {"samples that occur twice", "stretches that are constant"},
    ),
    "one label": (
        lambda s, v: [replace(x, is_random_next=0) for x in s],
        {"share of random next sentences", "stretches that are constant"},
    ),
    "one length": (
        long_only, {"lengths", "share below half the longest", "stretches that are constant"},
    ),
    "no masks applied": (masks_kept, {"masks that are [MASK]", "masks that kept their token"}),
    "a mask too few": (lambda s, v: [one_mask_less(x) for x in s], {"number of masks"}),
    "another frame": (other_frame, {"[CLS] A [SEP] B [SEP]"}),
    "stray masks": (lambda s, v: with_ids(s, 1, v.mask_id), {"[MASK] where nothing is predicted"}),
    "unknown words": (lambda s, v: with_ids(s, 8, v.tokens.index("[UNK]")), {"share of [UNK]"}),
    "ids beyond the vocabulary": (lambda s, v: with_ids(s, 1, len(v) + 5), {"token ids"}),
}  # fmt: skip


@pytest.mark.parametrize("name", EDITS)
def test_a_wrong_store_is_found_out(tmp_path: Path, good: list[Sample], vocabulary: Vocabulary, name: str) -> None:
    edit, expected = EDITS[name]
    found = set(wrong(store_of(edit(good, vocabulary), vocabulary, tmp_path), vocabulary))
    assert expected <= found, found
    assert len(found - expected) <= 3, "one fault shows in few other figures"


def test_one_long_document_fills_its_samples(tmp_path: Path, vocabulary: Vocabulary) -> None:
    """A stretch of samples of the full length is right where the order is known to be the text's, and only of this length."""
    rng = random.Random(2)
    low = vocabulary.mask_id + 1
    document = [[rng.randrange(low, len(vocabulary)) for _ in range(rng.randint(4, 14))] for _ in range(14_000)]
    params = replace(PARAMS, dupe_factor=1, short_seq_prob=0.0)
    samples = list(make_samples([document], vocabulary, params, 0))
    assert {len(sample.input_ids) for sample in samples[:-1]} == {64}
    store = store_of(samples, vocabulary, tmp_path)
    assert "stretches that are constant" in wrong(store, vocabulary)
    store.manifest["documents"] = 1
    assert wrong(store, vocabulary) == []
    store.manifest["params"]["max_seq_len"] = 70
    assert "stretches that are constant" in wrong(store, vocabulary)


def test_another_vocabulary(tmp_path: Path, good: list[Sample], vocabulary: Vocabulary) -> None:
    store = store_of(good, vocabulary, tmp_path)
    shifted = replace(vocabulary, sha256="0" * 64, cls_id=vocabulary.cls_id + 20, sep_id=vocabulary.sep_id + 20)
    assert {"vocabulary", "[CLS] A [SEP] B [SEP]"} <= set(wrong(store, shifted))


def test_a_copied_stretch_is_found_wherever_it_lies() -> None:
    rng = np.random.default_rng(0)
    lengths = rng.integers(5, 513, 50_000).astype(np.uint16)
    assert repeated_stretches(lengths) == 0
    for at in (31, 20_001, 49_999):
        copied = np.concatenate([lengths[:at], lengths[3000:4000], lengths[at:]])
        assert repeated_stretches(copied) > 20
    assert repeated_stretches(np.full(50_000, 512, np.uint16)) == 0  # equal lengths say nothing


def test_a_large_store_is_read_in_stretches_all_over_it() -> None:
    places = stretches(160_000_000, 200_000)
    assert len(places) == 200
    assert all(end - begin == 1000 for begin, end in places)
    assert all(begin >= 0 and end <= 160_000_000 for begin, end in places)
    assert all(b[0] >= a[1] for a, b in itertools.pairwise(places))
    assert max(b[0] - a[1] for a, b in itertools.pairwise(places)) < 1_700_000
    assert stretches(1500, 200_000) == [(0, 1000), (1000, 1500)]


def test_damage_of_a_header_is_a_finding_not_a_crash(
    tmp_path: Path, good: list[Sample], vocabulary: Vocabulary
) -> None:
    store_of(good, vocabulary, tmp_path)
    path = tmp_path / "store/samples.bin"
    raw = np.fromfile(path, np.uint16)
    raw[0:3] = (60_000, 60_000, 7)
    raw.tofile(path)
    store = Store(tmp_path / "store")
    assert wrong(store, vocabulary) == ["headers of records"]
    assert not check_hashes(store).passed


@pytest.mark.parametrize(("total", "most"), [(800, 500), (5, 1), (10_000, 999), (10_000, 1)])
def test_stretches_lie_inside_small_stores(total: int, most: int) -> None:
    places = stretches(total, most)
    assert places
    assert all(0 <= begin < end <= total for begin, end in places)
