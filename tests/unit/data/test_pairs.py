"""Stores of pairs: what is written is read back, as samples and as texts; what is no store of pairs is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bert_fast.data.batch import Batch, padded
from bert_fast.data.formats.convert import export_store
from bert_fast.data.pairs.batch import texts_of
from bert_fast.data.pairs.store import PairSource, PairStore, pair_sample, write_pair_store
from bert_fast.data.store import Store, write_part
from bert_fast.data.verify import verify_store
from bert_fast.data.wordpiece import Vocabulary
from bert_fast.errors import UserError

CLS, SEP = 2, 3
Pairs = list[list[list[int]]]  # the tokens of each text of each pair


@pytest.fixture
def pairs() -> Pairs:
    """20 pairs with one negative each."""
    rng = np.random.default_rng(0)
    return [[rng.integers(5, 60, rng.integers(1, 12)).tolist() for _ in range(3)] for _ in range(20)]


@pytest.fixture
def store(tmp_path: Path, pairs: Pairs, vocabulary: Vocabulary) -> PairStore:
    samples = [pair_sample(texts, CLS, SEP) for texts in pairs]
    parts = [write_part(tmp_path / f"{n}.bin", piece) for n, piece in enumerate((samples[:12], samples[12:]))]
    write_pair_store(
        tmp_path / "store", parts, np.arange(20) // 2, [PairSource("a", 0, 12, 3.0), PairSource("b", 12, 8, 1.0)],
        texts_per_pair=3, max_text_length=max(len(text) for texts in pairs for text in texts) + 2,
        prefixes={"query": "", "key": "passage: "},
        manifest={"vocab_sha256": vocabulary.sha256, "vocab_size": len(vocabulary), "mask_id": vocabulary.mask_id},
    )  # fmt: skip
    return PairStore(tmp_path / "store")


# ---- the store ------------------------------------------------------------------------------------------------------


def test_a_pair_is_its_texts_end_to_end(store: PairStore, pairs: Pairs) -> None:
    assert len(store) == 20
    for index, texts in enumerate(pairs):
        sample = store[index]
        framed = [[CLS, *text, SEP] for text in texts]
        assert sample.input_ids.tolist() == list(chain.from_iterable(framed))
        assert sample.len_a == len(framed[0])
        assert sample.masked_positions.tolist() == [0, len(framed[0]), len(framed[0]) + len(framed[1])]
        assert sample.masked_labels.tolist() == [0, 0, 0]
        assert sample.is_random_next == 0
    assert store.num_masked.tolist() == [3] * 20


def test_what_a_store_of_pairs_says_of_itself(store: PairStore) -> None:
    assert store.groups.tolist() == [n // 2 for n in range(20)]
    assert store.groups.dtype == np.uint32
    assert store.sources == (PairSource("a", 0, 12, 3.0), PairSource("b", 12, 8, 1.0))
    assert (store.texts_per_pair, store.prefixes) == (3, {"query": "", "key": "passage: "})
    manifest = store.manifest
    assert (manifest["format"], manifest["kind"]) == ("bert_fast store 1", "pairs")
    assert store.max_text_length < manifest["max_length"]
    assert "groups.npy" in manifest["tables_sha256"]
    store.verify()


def test_a_changed_group_is_found(store: PairStore) -> None:
    groups = np.load(store.folder / "groups.npy")
    np.save(store.folder / "groups.npy", groups[::-1])
    with pytest.raises(UserError, match=r"groups\.npy changed since it was written"):
        PairStore(store.folder).verify()


def test_the_longest_text_counts_and_not_the_longest_pair(store: PairStore) -> None:
    longest = store.max_text_length
    fits: dict[str, Any] = {"vocab_size": 64, "vocab_sha256": None, "sha256": None}
    store.check(max_seq_len=longest, **fits)
    with pytest.raises(UserError, match=f"holds a sample of {longest} tokens and data.max_seq_len={longest - 1}"):
        store.check(max_seq_len=longest - 1, **fits)


def test_pretraining_on_pairs_is_refused(store: PairStore) -> None:
    with pytest.raises(UserError, match=r"holds pairs of texts and no pretraining samples; set train\.objective=contr"):
        Store(store.folder).check(vocab_size=64, max_seq_len=512, vocab_sha256=None, sha256=None)


def test_pairs_are_not_exported_as_samples(store: PairStore, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="holds pairs of texts and no pretraining samples"):
        export_store(store.folder, tmp_path / "out", "tfrecord", width=64, most_masked=8, per_file=10, log=print)
    assert not (tmp_path / "out").exists()


def test_pairs_are_verified_as_far_as_all_stores_are(store: PairStore, vocabulary: Vocabulary) -> None:
    findings = verify_store(Store(store.folder), vocabulary)
    assert [(each.name, each.passed) for each in findings] == [("vocabulary", True), ("headers of records", True)]


def test_training_on_pairs_needs_pairs(stores: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no pairs of texts; make pairs with: python scripts/prepare_pairs\.py --out"):
        PairStore(stores / "train")
    with pytest.raises(UserError, match=r"no data at .*make it with: python scripts/prepare_pairs\.py --out .*/none$"):
        PairStore(tmp_path / "none" / "train")


def change(**values: Any) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        manifest = json.loads((folder / "manifest.json").read_text())
        (folder / "manifest.json").write_text(json.dumps({**manifest, **values}))

    return edit


def entry(**values: Any) -> dict[str, Any]:
    return {"name": "a", "first": 0, "num_pairs": 20, "weight": 1.0, **values}


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: (f / "groups.npy").unlink(), "is damaged"),
        (lambda f: (f / "groups.npy").write_bytes(b"x"), "is damaged"),
        (lambda f: np.save(f / "groups.npy", np.zeros(3, np.uint32)), "is truncated: 3 groups of 20 pairs"),
        (change(texts_per_pair=2), "60 texts in 20 pairs of 2"),
        (change(texts_per_pair=None), "texts_per_pair is None"),
        (change(prefixes=[]), r"prefixes is \[\]"),
        (change(sources=[]), "sources are not 20 pairs"),
        (change(sources=["a"]), "sources are not 20 pairs"),
        (change(sources=[entry(num_pairs=19)]), "sources are not 20 pairs"),
        (change(sources=[entry(first=1)]), "sources are not 20 pairs"),
        (change(sources=[entry(weight=0)]), "sources are not 20 pairs"),
        (change(sources=[entry(), entry(first=20, num_pairs=0)]), "sources are not 20 pairs"),
    ],
)
def test_a_damaged_store_of_pairs_is_refused(store: PairStore, damage: Callable[[Path], Any], message: str) -> None:
    damage(store.folder)
    with pytest.raises(UserError, match=f"{message}.*prepare the pairs again") as caught:
        PairStore(store.folder)
    assert str(store.folder) in str(caught.value)


def test_a_pair_longer_than_a_store_holds() -> None:
    assert len(pair_sample([[7] * 32_765, [7] * 32_766], CLS, SEP).input_ids) == 65_535
    with pytest.raises(ValueError, match="a pair of 65,536 tokens"):
        pair_sample([[7] * 32_766, [7] * 32_766], CLS, SEP)


# ---- texts of a batch -----------------------------------------------------------------------------------------------


def test_the_texts_of_a_batch(store: PairStore, pairs: Pairs) -> None:
    ids = np.random.default_rng(1).permutation(20)[:7]
    batch = store.batch(ids)
    found = texts_of(batch)
    order = sorted(ids.tolist(), key=lambda i: -sum(map(len, pairs[i])))
    texts = [[CLS, *text, SEP] for i in order for text in pairs[i]]
    assert found.lengths == [len(text) for text in texts]
    assert all(type(length) is int for length in found.lengths)
    assert found.input_ids.tolist() == list(chain.from_iterable(texts))
    assert found.position_ids.tolist() == [place for text in texts for place in range(len(text))]
    assert found.token_type_ids.tolist() == [0] * batch.num_tokens
    starts = np.cumsum([0, *found.lengths])
    assert found.cu_seqlens.tolist() == starts.tolist()
    assert found.masked_positions.tolist() == starts[:-1].tolist()
    assert (found.input_ids[found.masked_positions] == CLS).all()
    assert found.sample_ids.tolist() == [i for i in batch.sample_ids.tolist() for _ in range(3)]
    for zeros in (found.masked_labels, found.next_sentence_labels):
        assert zeros.tolist() == [0] * 21
    for name, value in vars(found).items():
        if name != "lengths":
            assert value.dtype == getattr(batch, name).dtype, name


def test_the_texts_of_one_pair(store: PairStore) -> None:
    assert texts_of(store.batch(np.array([5]))).sample_ids.tolist() == [5, 5, 5]


def test_what_is_no_batch_of_pairs(store: PairStore, stores: Path) -> None:
    wrong: list[Batch] = [padded(store.batch(np.arange(4)), 64), Store(stores / "train").batch(np.arange(4))]
    for batch in wrong:
        with pytest.raises(ValueError, match="no batch of pairs"):
            texts_of(batch)
