"""Layouts of a batch: rows of one length, padding to the longest, a multiple of tokens. No sample may notice."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from bert_fast.config import Config
from bert_fast.data.batch import Batch, in_rows, padded, to_longest
from bert_fast.data.store import Store
from bert_fast.model.bert import BertForPretraining
from bert_fast.train.batches import batch_of_lengths, to_device


def samples_in(batch: Batch, real: np.ndarray) -> list[tuple[list[int], ...]]:
    """Tokens, types, positions, masks relative to the sample with labels, and next-sentence label of real sequences."""
    found = []
    for number in np.flatnonzero(real):
        start, end = batch.cu_seqlens[number], batch.cu_seqlens[number + 1]
        inside = (batch.masked_positions >= start) & (batch.masked_positions < end) & (batch.masked_labels >= 0)
        found.append((
            batch.input_ids[start:end].tolist(), batch.token_type_ids[start:end].tolist(),
            batch.position_ids[start:end].tolist(), (batch.masked_positions[inside] - start).tolist(),
            batch.masked_labels[inside].tolist(), [int(batch.next_sentence_labels[number])],
        ))  # fmt: skip
    return found


def check(batch: Batch) -> None:
    """Arrays fit each other."""
    assert batch.cu_seqlens.dtype == np.int32
    np.testing.assert_array_equal(np.diff(batch.cu_seqlens), batch.lengths)
    assert batch.cu_seqlens[-1] == len(batch.input_ids) == len(batch.token_type_ids) == len(batch.position_ids)
    assert len(batch.masked_positions) == len(batch.masked_labels)


@pytest.fixture
def batch() -> Batch:
    return batch_of_lengths(np.array([10, 6, 16, 3, 7, 9]), 50, np.random.default_rng(0), mask_share=0.2)


ROWS = np.array([0, 0, 1, 3, 3, 4])


def test_rows_hold_their_samples(batch: Batch) -> None:
    rows = in_rows(batch, ROWS, num_rows=5, row_length=16)
    check(rows)
    assert rows.num_tokens == 80
    assert rows.lengths == [10, 6, 16, 16, 3, 7, 6, 9, 7]  # row 0 is full; row 2 is empty
    real = rows.next_sentence_labels >= 0
    assert real.tolist() == [True, True, True, False, True, True, False, True, False]
    assert samples_in(rows, real) == samples_in(batch, np.ones(6, bool))
    assert len(rows.masked_labels) % (5 * 3) == 0
    assert (rows.masked_labels >= 0).sum() == len(batch.masked_labels)
    np.testing.assert_array_equal(rows.sample_ids, batch.sample_ids)


@pytest.mark.parametrize(("mask_share", "room"), [(0.15, 82), (0.4, 210), (0.155, 85)])
def test_masks_of_rows_come_in_the_multiple_that_their_share_needs(mask_share: float, room: int) -> None:
    """Of rows of 512: a hundredth more than the share, in whole tokens."""
    batch = batch_of_lengths(np.full(4, 256), 50, np.random.default_rng(0), mask_share)
    rows = in_rows(batch, np.array([0, 0, 1, 1]), 2, 512, mask_share)
    assert len(rows.masked_labels) == 2 * room
    assert (rows.masked_labels >= 0).sum() == len(batch.masked_labels)


def test_to_longest_has_the_tokens_of_a_padded_batch() -> None:
    batch = batch_of_lengths(np.array([16, 10, 9, 3]), 50, np.random.default_rng(0))
    longest = to_longest(batch)
    check(longest)
    assert longest.num_tokens == 4 * 16
    assert longest.lengths == [16, 10, 9, 3, 13, 7, 6]
    real = longest.next_sentence_labels >= 0
    assert samples_in(longest, real) == samples_in(batch, np.ones(4, bool))


def test_layouts_of_full_samples_change_nothing() -> None:
    batch = batch_of_lengths(np.array([16, 16]), 50, np.random.default_rng(0))
    for laid in (to_longest(batch), in_rows(batch, np.array([0, 1]), 2, 16)):
        np.testing.assert_array_equal(laid.input_ids, batch.input_ids)
        assert laid.lengths == batch.lengths


@pytest.mark.parametrize("backend", ["loop", "grouped", "matmul", "padded"])
@pytest.mark.parametrize("layout", ["in_rows", "to_longest", "padded"])
def test_no_sample_notices_its_neighbours(
    make_config: Callable[..., Config], batch: Batch, layout: str, backend: str
) -> None:
    """Losses, hits and gradients are those of the bare batch: attention, positions and losses stay inside samples."""
    config = make_config("model.hidden_dropout=0", "model.attention_dropout=0").model
    model = BertForPretraining(config, backend).double()
    laid = {
        "in_rows": lambda: in_rows(batch, ROWS, 5, 16), "to_longest": lambda: to_longest(batch),
        "padded": lambda: padded(in_rows(batch, ROWS, 5, 16), 64),
    }[layout]()  # fmt: skip
    results = []
    for each in (batch, laid):
        model.zero_grad()
        losses = model(to_device(each, torch.device("cpu")), with_accuracy=True)
        (losses.mlm_sum + losses.nsp_sum).backward()
        gradient = torch.cat([p.grad.ravel() for p in model.parameters()])
        results.append((torch.stack([x.double() for x in losses]), gradient))
    torch.testing.assert_close(results[0], results[1], rtol=1e-9, atol=1e-12)


def test_store_keeps_the_order_if_asked(stores: Path) -> None:
    store = Store(stores / "train")
    ids = np.array([7, 3, 30, 11])
    assert store.batch(ids, keep_order=True).sample_ids.tolist() == ids.tolist()
    assert store.batch(ids, keep_order=True).lengths == store.lengths[ids].tolist()
