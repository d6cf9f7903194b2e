"""Evaluation on text of training: found by content, however the samples were cut and masked; held-out stores pass."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from bert_fast.config import Config
from bert_fast.data.overlap import Shared, known_shared_text, note_shared_text, shared_text
from bert_fast.data.samples import Sample
from bert_fast.data.store import Store, merge_parts, write_part
from bert_fast.errors import UserError
from bert_fast.train.environment import Environment
from bert_fast.train.setup.held_out import find_shared_text

CLS, SEP, MASK, VOCAB = 2, 3, 4, 90
CPU = Environment(0, 0, 1, torch.device("cpu"), torch.float32)


def documents(seed: int, count: int = 60) -> list[np.ndarray]:
    """Texts of 100 to 300 random tokens."""
    rng = np.random.default_rng(seed)
    return [rng.integers(5, VOCAB, rng.integers(100, 300)) for _ in range(count)]


def make_store(folder: Path, texts: list[np.ndarray], seed: int) -> Store:
    """Samples of up to 64 tokens: two segments cut at places of the seed's, a seventh of the tokens masked."""
    rng = np.random.default_rng(seed)
    samples = []
    for text in texts:
        place = int(rng.integers(0, 20))
        while place + 30 < len(text):
            a, b = rng.integers(13, 30, 2)
            parts = [[CLS], text[place : place + a], [SEP], text[place + a : place + a + b], [SEP]]
            ids = np.concatenate(parts).astype(np.uint16)
            inner = np.setdiff1d(np.arange(1, len(ids) - 1), [1 + a])
            masked = np.sort(rng.choice(inner, len(ids) // 7, replace=False)).astype(np.uint16)
            labels = ids[masked]
            ids[masked] = MASK
            samples.append(Sample(ids, int(a) + 2, masked, labels, 0))
            place += int(a + b)
    folder.mkdir(parents=True)
    merge_parts(folder, [write_part(folder / "part", samples)], {"vocab_size": VOCAB, "vocab_sha256": "0"})
    return Store(folder)


def test_held_out_documents_share_nothing(tmp_path: Path) -> None:
    shared = shared_text(make_store(tmp_path / "a", documents(0), 1), make_store(tmp_path / "b", documents(1), 2))
    assert (shared.found, shared.looked_at) == (0, 1.0)
    assert shared.compared > 100
    assert shared.is_held_out


@pytest.mark.parametrize("share", [0.5, 1.0])
def test_the_same_documents_cut_and_masked_anew_are_found(tmp_path: Path, share: float) -> None:
    texts = documents(0)
    mixed = texts[: int(share * 60)] + documents(1)[int(share * 60) :]
    shared = shared_text(make_store(tmp_path / "a", 2 * texts, 1), make_store(tmp_path / "b", mixed, 2))
    assert 0.7 * share < shared.found / shared.compared <= share + 0.05
    assert not shared.is_held_out


def test_of_a_large_store_a_part_is_looked_at(tmp_path: Path) -> None:
    """Each document three times over, as a duplication factor has it."""
    train = make_store(tmp_path / "a", 3 * documents(0), 1)
    same, other = (
        shared_text(train, make_store(tmp_path / name, documents(s), 2), max_train_tokens=15_000, max_eval_tokens=3_000)
        for name, s in (("b", 0), ("c", 1))
    )
    assert 0.3 < same.looked_at < 0.7
    assert 20 < same.compared < 150
    assert not same.is_held_out
    assert other.is_held_out


def test_one_token_file_is_known_by_its_hash(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = make_store(tmp_path / "a", documents(0), 1)
    monkeypatch.setattr(Store, "batch", lambda *_, **__: pytest.fail("nothing need be read"))
    assert shared_text(store, store, 10) == Shared(10, 10)


def test_it_is_refused_or_named_where_it_is_wanted(make_config: Callable[..., Config], tmp_path: Path) -> None:
    stores = make_store(tmp_path / "a", documents(0), 1), make_store(tmp_path / "b", documents(0), 2)
    config = make_config(f"data.train={tmp_path / 'a'}", f"evaluation.data={tmp_path / 'b'}")
    with pytest.raises(
        UserError, match=r"\d+ of \d+ samples of the evaluation store .*or set data\.allow_shared_text=true"
    ):
        find_shared_text(*stores, config, CPU)
    wanted = config.model_copy(update={"data": config.data.model_copy(update={"allow_shared_text": True})})
    assert not find_shared_text(*stores, wanted, CPU).is_held_out


def test_what_a_preparation_noted_is_believed_of_its_own_training_store_alone(
    make_config: Callable[..., Config], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train, evaluation = make_store(tmp_path / "a", documents(0), 1), make_store(tmp_path / "b", documents(1), 2)
    noted = note_shared_text(train, evaluation)
    again = Store(tmp_path / "b")
    assert known_shared_text(train, again) == noted == shared_text(train, evaluation)
    assert known_shared_text(make_store(tmp_path / "c", documents(1), 3), again) is None
    monkeypatch.setattr("bert_fast.train.setup.held_out.shared_text", lambda *_: pytest.fail("compared again"))
    assert find_shared_text(train, again, make_config(), CPU) == noted
