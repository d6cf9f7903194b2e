"""Evaluation over sharded, batched samples against one sample at a time."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import astuple

import numpy as np
import pytest
import torch

from bert_fast.balance.cost import CostModel
from bert_fast.config import Config
from bert_fast.data.store import Store
from bert_fast.model.attention import SequenceLayout
from bert_fast.model.bert import BertForPretraining, BertInput
from bert_fast.train.environment import Environment
from bert_fast.train.evaluate import Evaluator, shard_samples


@pytest.mark.parametrize(("samples", "ranks"), [(1, 1), (1, 3), (7, 3), (9, 3), (64, 4)])
def test_every_evaluation_sample_is_on_one_rank(samples: int, ranks: int) -> None:
    shards = shard_samples(np.random.default_rng(0).random(samples), ranks)
    assert len(shards) == ranks
    assert sorted(i for shard in shards for i in shard) == list(range(samples))
    assert max(map(len, shards)) - min(map(len, shards)) <= 1


def plain_evaluation(model: BertForPretraining, store: Store, count: int) -> tuple[float | None, ...]:
    """Sample by sample: accuracy and mean loss of masked tokens, accuracy and mean loss of next sentences, None without."""
    correct = masked = next_correct = 0
    loss = next_loss = 0.0
    for index in range(count):
        sample = store[index]
        length = len(sample.input_ids)
        labels = torch.tensor(sample.masked_labels.astype(np.int64))
        positions = torch.arange(length)
        inputs = BertInput(
            torch.tensor(sample.input_ids.astype(np.int64)),
            (positions >= sample.len_a).long(),
            positions,
            torch.tensor(sample.masked_positions.astype(np.int64)),
            labels,
            torch.tensor([sample.is_random_next]),
            SequenceLayout([length], torch.tensor([0, length], dtype=torch.int32)),
        )
        mlm, nsp = model.logits(inputs)
        loss -= mlm.log_softmax(-1)[torch.arange(len(labels)), labels].sum().item()
        correct += int((mlm.argmax(-1) == labels).sum())
        masked += len(labels)
        if nsp is not None:
            next_loss -= nsp.log_softmax(-1)[0, sample.is_random_next].item()
            next_correct += int(nsp.argmax() == sample.is_random_next)
    if not model.config.next_sentence:
        return correct / masked, loss / masked, None, None
    return correct / masked, loss / masked, next_correct / count, next_loss / count


@pytest.mark.parametrize(
    ("eval_batch", "count", "settings"),
    [
        (7, None, ()),
        (7, 30, ()),
        (1000, None, ()),
        (1000, 30, ()),
        (7, 30, ("model.last_layer=predicted",)),
        (7, 30, ("model.next_sentence=false", "model.last_layer=predicted")),
        (1000, 30, ("model.next_sentence=false", "data.dynamic_masking=true", "data.mask_fraction=0.4")),
    ],
)
def test_evaluation_equals_one_sample_at_a_time(
    make_config: Callable[..., Config],
    environment: Environment,
    eval_batch: int,
    count: int | None,
    settings: tuple[str, ...],
) -> None:
    """On the store's own masks, whatever training draws."""
    config = make_config(
        f"evaluation.batch_size={eval_batch}",
        f"evaluation.num_samples={'null' if count is None else count}",
        "model.hidden_dropout=0.5",
        *settings,
    )
    model = BertForPretraining(config.model, "matmul").double()
    store = Store(config.evaluation.data)
    assert len(store) > 35
    model.train()
    result = Evaluator(store, config.evaluation, config.batch.shape_multiple, CostModel(1.0, 0.0), environment)(model)
    assert model.training, "the mode is put back"
    expected = plain_evaluation(model.eval(), store, count or len(store))
    for found, other in zip(astuple(result)[:4], expected, strict=True):
        assert found == (None if other is None else pytest.approx(other, rel=1e-9))
