"""Dynamic masking: the rates of the static one, other places each step, the same whatever rank has the sample."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
from support.one_run import execute

from bert_fast.config import Config
from bert_fast.data.batch import Batch
from bert_fast.data.masking import check_fraction, mask_id_of, redraw
from bert_fast.data.samples import SampleParams, make_samples, num_to_predict
from bert_fast.data.store import Store
from bert_fast.data.wordpiece import Vocabulary
from bert_fast.errors import UserError


@pytest.fixture
def store(stores: Path) -> Store:
    return Store(stores / "train")


def drawn(store: Store, ids: np.ndarray, step: int = 3, seed: int = 1, fraction: float | None = None) -> Batch:
    return redraw(store.batch(ids), seed=seed, step=step, mask_id=4, vocab_size=64, fraction=fraction)


def masks_per_sample(batch: Batch) -> np.ndarray:
    return np.histogram(batch.masked_positions, batch.cu_seqlens)[0]


def originals(batch: Batch) -> np.ndarray:
    ids = batch.input_ids.copy()
    ids[batch.masked_positions] = batch.masked_labels
    return ids


def test_the_text_and_the_numbers_of_masks_stay(store: Store) -> None:
    ids = np.arange(100)
    before, after = store.batch(ids), drawn(store, ids)
    np.testing.assert_array_equal(originals(before), originals(after))
    np.testing.assert_array_equal(masks_per_sample(before), masks_per_sample(after))
    assert (np.diff(after.masked_positions) > 0).all()


def test_special_tokens_are_never_masked(store: Store) -> None:
    before = store.batch(np.arange(200))
    after = drawn(store, np.arange(200))
    assert not np.isin(after.masked_labels, (originals(before)[0], originals(before)[before.cu_seqlens[1] - 1])).any()


def test_rates_are_eighty_ten_ten_and_places_uniform(store: Store) -> None:
    hits = np.zeros(32)
    kinds = np.zeros(3)
    for step in range(60):
        batch = drawn(store, np.arange(len(store)), step)
        new = batch.input_ids[batch.masked_positions]
        kept = new == batch.masked_labels
        kinds += [(new == 4).sum(), kept.sum(), ((new != 4) & ~kept).sum()]
        full = np.repeat(np.array(batch.lengths) == max(batch.lengths), batch.lengths)
        hits += np.bincount(batch.position_ids[batch.masked_positions][full[batch.masked_positions]], minlength=32)[:32]
    np.testing.assert_allclose(kinds / kinds.sum(), [0.8, 0.1, 0.1], atol=0.02)
    inner = hits[1 : max(batch.lengths) - 1]
    assert inner.min() > 0.2 * inner.mean(), "every place is masked at times"


def test_a_draw_depends_on_sample_step_and_seed_alone(store: Store) -> None:
    whole = drawn(store, np.arange(40))
    alone = drawn(store, np.array([17]))
    row = int(np.flatnonzero(whole.sample_ids == 17)[0])
    a, b = whole.cu_seqlens[row], whole.cu_seqlens[row + 1]
    np.testing.assert_array_equal(whole.input_ids[a:b], alone.input_ids)
    for other in (drawn(store, np.arange(40), step=4), drawn(store, np.arange(40), seed=2)):
        assert (other.masked_positions != whole.masked_positions).mean() > 0.5


def test_a_store_that_does_not_say_its_mask(store: Store) -> None:
    assert mask_id_of(store.manifest, "x") == 4
    with pytest.raises(UserError, match="store x does not say which token is"):
        mask_id_of({}, "x")


# ---- data.mask_fraction ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fraction", [0.001, 0.15, 0.2, 0.4, 0.5, 0.97])
@pytest.mark.parametrize("most", [8, None])
def test_the_number_of_masks_is_that_of_a_store_made_with_the_fraction(
    vocabulary: Vocabulary, make_documents: Callable[..., list[list[list[int]]]], fraction: float, most: int | None
) -> None:
    params = SampleParams(max_seq_len=32, max_predictions=most or 1000, mask_prob=fraction, dupe_factor=1, seed=0)
    samples = list(make_samples(make_documents(20), vocabulary, params, chunk=0))
    lengths = np.array([len(sample.input_ids) for sample in samples])
    counts = [len(sample.masked_labels) for sample in samples]
    assert num_to_predict(lengths, fraction, most).tolist() == counts
    assert len(set(lengths.tolist())) > 10


def test_a_sample_of_special_tokens_alone_has_no_mask() -> None:
    assert num_to_predict(np.array([2, 3, 4, 5], np.uint16), 0.9).tolist() == [0, 0, 1, 2]


@pytest.mark.parametrize("fraction", [0.05, 0.2, 0.4, 0.97])
def test_the_fraction_decides_the_number_of_masks_and_keeps_the_text(store: Store, fraction: float) -> None:
    ids = np.arange(100)
    before, after = store.batch(ids), drawn(store, ids, fraction=fraction)
    np.testing.assert_array_equal(originals(before), originals(after))
    assert masks_per_sample(after).tolist() == num_to_predict(np.array(after.lengths), fraction).tolist()
    ends = np.array(after.cu_seqlens[1:]) - 1
    assert not np.isin(after.masked_positions, [*after.cu_seqlens[:-1], *ends]).any()
    assert (after.position_ids[after.masked_positions] > 0).all()
    separator = originals(before)[ends[0]]
    assert separator not in after.masked_labels


def test_the_stores_own_fraction_draws_what_no_fraction_draws(store: Store) -> None:
    own, unset = drawn(store, np.arange(100), fraction=0.15), drawn(store, np.arange(100))
    np.testing.assert_array_equal(own.input_ids, unset.input_ids)
    np.testing.assert_array_equal(own.masked_positions, unset.masked_positions)


def test_a_fraction_other_than_the_stores_needs_new_masks(make_config: Callable[..., Config]) -> None:
    made = {"params": asdict(SampleParams(mask_prob=0.15))}  # as prepare_data.py writes it
    for settings in ((), ("data.mask_fraction=0.15",), ("data.mask_fraction=0.4", "data.dynamic_masking=true")):
        check_fraction(made, "x", make_config(*settings).data)
    other = make_config("data.mask_fraction=0.4").data
    with pytest.raises(
        UserError, match=r"^store x was made with a mask fraction of 0\.15, and .*dynamic_masking=true[^\n]*$"
    ):
        check_fraction(made, "x", other)
    for manifest in ({}, {"params": None}, {"params": {"dupe_factor": 2}}):
        with pytest.raises(UserError, match="^store x does not say with which mask fraction it was made, and "):
            check_fraction(manifest, "x", other)


def test_a_run_refuses_a_fraction_that_its_store_may_not_have(make_config: Callable[..., Config]) -> None:
    with pytest.raises(
        UserError, match=r"does not say with which mask fraction it was made, and data\.mask_fraction=0\.2"
    ):
        execute(make_config("data.mask_fraction=0.2"))


@pytest.mark.parametrize("strategy", ["balanced", "packed", "pad_to_longest"])
def test_a_run_draws_anew_whatever_the_layout(make_config: Callable[..., Config], strategy: str) -> None:
    losses = {}
    for masks, settings in {
        "static": [], "drawn": ["data.dynamic_masking=true"],
        "more": ["data.dynamic_masking=true", "data.mask_fraction=0.3"],
    }.items():  # fmt: skip
        config = make_config(f"balance.strategy={strategy}", "train.max_steps=3", "train.log_every_steps=1", *settings)
        config = config.model_copy(
            update={"run": config.run.model_copy(update={"folder": f"{config.run.folder}-{masks}"})}
        )
        _, summary = execute(config)
        assert summary.outcome.status == "success"
        lines = (Path(config.run.folder or "") / "metrics.jsonl").read_text().splitlines()
        losses[masks] = [json.loads(line)["mlm_loss"] for line in lines if json.loads(line)["kind"] == "step"]
    assert len(losses["drawn"]) == 3
    for masks in ("drawn", "more"):  # a loss per masked token does not grow with their number
        assert losses[masks] != losses["static"]
        np.testing.assert_allclose(losses[masks], losses["static"], rtol=0.2)
