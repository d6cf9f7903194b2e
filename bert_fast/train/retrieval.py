"""Evaluation of embeddings: does each held-out query find its positive among all held-out keys?

Accuracy is the share of queries whose positive has the highest cosine of all keys; a tie with another key does not count.
Alignment and uniformity are those of Wang and Isola, arXiv 2005.10242.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F

from bert_fast.balance.cost import CostModel
from bert_fast.config import Config
from bert_fast.contrastive.model import BertForEmbeddings
from bert_fast.contrastive.objective import Contrastive
from bert_fast.data.batch import Batch
from bert_fast.data.pairs.batch import texts_of
from bert_fast.data.store import Store
from bert_fast.model.bert import BertForPretraining
from bert_fast.train.batches import to_device
from bert_fast.train.environment import Environment
from bert_fast.train.evaluate import Evaluation, shard_samples
from bert_fast.train.step import do_nothing

_CHUNK = 1024  # queries whose scores are in memory at a time
_MOST_FOR_UNIFORMITY = 4096  # embeddings of which all pairs are compared


class RetrievalEvaluator:
    """Reads its shard of pairs once. Arguments as `Evaluator` has them."""

    def __init__(self, store: Store, config: Config, cost: CostModel, environment: Environment) -> None:
        self._environment, self._objective = environment, Contrastive(config.contrastive)
        size = config.evaluation.batch_size
        self._total = min(len(store), config.evaluation.num_samples or len(store))
        lengths = np.asarray(store.lengths[: self._total])
        mine = shard_samples(cost(lengths), environment.world_size)[environment.rank]
        mine = mine[np.argsort(-lengths[mine], kind="stable")]
        read: list[Batch] = [store.batch(mine[start : start + size]) for start in range(0, len(mine), size)]
        self._ids = torch.from_numpy(np.concatenate([batch.sample_ids for batch in read] or [np.zeros(0, np.int64)]))
        multiple = config.batch.shape_multiple
        self.batches = [to_device(texts_of(batch), environment.device, multiple) for batch in read]

    def meet_in_every_batch(self) -> None:
        raise NotImplementedError("engines without all weights are refused with this objective")

    @torch.no_grad()
    def __call__(
        self,
        model: BertForPretraining,
        on_batch: Callable[[], None] = do_nothing,
        on_sync: Callable[[], None] = do_nothing,
    ) -> Evaluation:
        """Evaluate. A collective."""
        assert isinstance(model, BertForEmbeddings)
        environment = self._environment
        was_training = model.training
        model.eval()
        width = model.config.hidden_size
        found = [torch.zeros(0, width, device=environment.device)]
        with torch.autocast(environment.device.type, environment.dtype, enabled=environment.autocast):
            for batch in self.batches:
                on_batch()
                found.append(F.normalize(model(batch).float(), dim=1))
        model.train(was_training)
        on_sync()
        every = self._gather(torch.cat(found))
        return self._evaluate(every, float(self._objective.scale_of(model.log_scale)))

    def _gather(self, mine: torch.Tensor) -> torch.Tensor:
        """Embeddings of all ranks in the order of the store, fp32 [pairs, texts, D]. A collective."""
        per_pair = self._objective.texts_per_pair
        mine = mine.unflatten(0, (-1, per_pair))
        every = torch.zeros(self._total, per_pair, mine.shape[-1], device=mine.device)
        every[self._ids.to(mine.device)] = mine
        if dist.is_initialized():
            dist.all_reduce(every)  # each row is of one rank
        return every

    def _evaluate(self, every: torch.Tensor, scale: float) -> Evaluation:
        queries, positives = every[:, 0], every[:, 1]
        keys = torch.cat([positives, every[:, 2:].flatten(0, 1)])
        ranks, losses = [], []
        for start in range(0, len(queries), _CHUNK):
            scores = queries[start : start + _CHUNK] @ keys.T
            rows = torch.arange(len(scores), device=scores.device)
            own = scores[rows, start + rows]
            ranks.append((scores >= own[:, None]).sum(1))  # its own one counts as well
            losses.append(torch.logsumexp(scale * scores, 1) - scale * own)
        rank = torch.cat(ranks).double()
        sample = torch.cat([queries, positives])[:: max(1, 2 * len(queries) // _MOST_FOR_UNIFORMITY)]
        distances = torch.pdist(sample).double() if len(sample) > 1 else rank.new_zeros(1)
        return Evaluation(
            mlm_accuracy=float((rank <= 1).double().mean()),
            mlm_loss=float(torch.cat(losses).double().mean()),
            nsp_accuracy=None,
            nsp_loss=None,
            at_10=float((rank <= 10).double().mean()),
            mrr=float((1 / rank).mean()),
            alignment=float((queries - positives).double().square().sum(1).mean()),
            uniformity=float((-2 * distances.square()).exp().mean().log()),
        )
