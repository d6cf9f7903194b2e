"""Dynamic masking: the rates of the static one, other places each step, the same whatever rank has the sample."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from support.one_run import execute

from bert_fast.config import Config
from bert_fast.data.batch import Batch
from bert_fast.data.masking import mask_id_of, redraw
from bert_fast.data.store import Store
from bert_fast.errors import UserError


@pytest.fixture
def store(stores: Path) -> Store:
    return Store(stores / "train")


def drawn(store: Store, ids: np.ndarray, step: int = 3, seed: int = 1) -> Batch:
    return redraw(store.batch(ids), seed=seed, step=step, mask_id=4, vocab_size=64)


def originals(batch: Batch) -> np.ndarray:
    ids = batch.input_ids.copy()
    ids[batch.masked_positions] = batch.masked_labels
    return ids


def test_the_text_and_the_numbers_of_masks_stay(store: Store) -> None:
    ids = np.arange(100)
    before, after = store.batch(ids), drawn(store, ids)
    np.testing.assert_array_equal(originals(before), originals(after))
    counts = [np.histogram(b.masked_positions, b.cu_seqlens)[0] for b in (before, after)]
    np.testing.assert_array_equal(*counts)
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


@pytest.mark.parametrize("strategy", ["balanced", "packed", "pad_to_longest"])
def test_a_run_draws_anew_whatever_the_layout(make_config: Callable[..., Config], strategy: str) -> None:
    losses = {}
    for dynamic in ("false", "true"):
        config = make_config(
            f"balance.strategy={strategy}", f"data.dynamic_masking={dynamic}", "train.max_steps=3",
            "train.log_every_steps=1",
        )  # fmt: skip
        config = config.model_copy(
            update={"run": config.run.model_copy(update={"folder": f"{config.run.folder}-{dynamic}"})}
        )
        _, summary = execute(config)
        assert summary.outcome.status == "success"
        lines = (Path(config.run.folder or "") / "metrics.jsonl").read_text().splitlines()
        losses[dynamic] = [json.loads(line)["mlm_loss"] for line in lines if json.loads(line)["kind"] == "step"]
    assert len(losses["true"]) == 3
    assert losses["true"] != losses["false"]
    np.testing.assert_allclose(losses["true"], losses["false"], rtol=0.2)
