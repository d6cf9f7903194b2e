"""Masked-LM accuracy on the held-out store, sharded over ranks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist

from bert_fast.balance.assign import karmarkar_karp
from bert_fast.balance.cost import CostModel
from bert_fast.config import EvaluationConfig
from bert_fast.data.store import Store
from bert_fast.model.bert import BertForPretraining, BertInput
from bert_fast.train.batches import to_device
from bert_fast.train.environment import Environment


@dataclass(frozen=True)
class Evaluation:
    """Over the whole held-out set."""

    mlm_accuracy: float
    mlm_loss: float
    nsp_accuracy: float
    nsp_loss: float


class Evaluator:
    """Reads its shard once, keeps it on the device, evaluates it as often as asked."""

    def __init__(
        self,
        store: Store,
        config: EvaluationConfig,
        shape_multiple: int,
        cost: CostModel,
        environment: Environment,
    ) -> None:
        self._environment = environment
        total = min(len(store), config.num_samples or len(store))
        lengths = np.asarray(store.lengths[:total])
        self._num_samples = total
        self._num_masked = int(np.asarray(store.num_masked[:total]).sum(dtype=np.int64))
        mine = _shard(cost(lengths), environment.world_size)[environment.rank]
        mine = mine[np.argsort(-lengths[mine], kind="stable")]  # like lengths together
        self._batches: list[BertInput] = [
            to_device(store.batch(mine[start : start + config.batch_size]), environment.device, shape_multiple)
            for start in range(0, len(mine), config.batch_size)
        ]

    @torch.no_grad()
    def __call__(
        self,
        model: BertForPretraining,
        on_batch: Callable[[], None] = lambda: None,
        on_exchange: Callable[[], None] = lambda: None,
    ) -> Evaluation:
        """Evaluate. A collective: all ranks call it together.

        Args:
            on_batch: called before every batch.
            on_exchange: called before the wait for the other ranks.
        """
        environment = self._environment
        sums = torch.zeros(4, dtype=torch.float64, device=environment.device)
        was_training = model.training
        model.eval()
        with torch.autocast(environment.device.type, environment.dtype, enabled=environment.autocast):
            for batch in self._batches:
                on_batch()
                losses = model(batch, with_accuracy=True)
                sums += torch.stack([x.double() for x in losses])
        model.train(was_training)
        on_exchange()
        if dist.is_initialized():
            dist.all_reduce(sums)
        mlm_loss, nsp_loss, mlm_correct, nsp_correct = sums.tolist()
        return Evaluation(
            mlm_correct / self._num_masked, mlm_loss / self._num_masked,
            nsp_correct / self._num_samples, nsp_loss / self._num_samples,
        )  # fmt: skip


def _shard(costs: np.ndarray, num_ranks: int) -> list[np.ndarray]:
    """Every sample on exactly one rank: the balanced deal for whole rows, the rest one each."""
    whole = len(costs) // num_ranks * num_ranks
    rest = np.arange(whole, len(costs))
    rows = karmarkar_karp(costs[:whole], num_ranks) if whole else np.zeros((num_ranks, 0), np.int64)
    return [np.concatenate([rows[rank], rest[rank : rank + 1]]).astype(np.int64) for rank in range(num_ranks)]
