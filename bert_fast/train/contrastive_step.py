"""A step on pairs of texts: one loss over the embeddings of all micro-batches of all ranks."""

from __future__ import annotations

import functools
from dataclasses import replace

import numpy as np
import torch

from bert_fast.config import Config
from bert_fast.contrastive.gradcache import cached_backward
from bert_fast.contrastive.loss import ContrastiveLoss
from bert_fast.contrastive.model import BertForEmbeddings
from bert_fast.contrastive.objective import Contrastive
from bert_fast.data.batch import Batch
from bert_fast.data.pairs.batch import texts_of
from bert_fast.model.bert import BertInput
from bert_fast.trace import span_or_nothing
from bert_fast.train.step import StepInput, TrainStep


class ContrastiveStep(TrainStep):
    """Embeddings of all micro-batches without a graph, the loss, and each micro-batch again with one.

    contrastive/gradcache.py does that. A single micro-batch is computed once. The loss that a step returns counts for every
    text of the rank, so that sums over ranks divided by all texts are the loss.
    """

    _objective: Contrastive

    @functools.cached_property
    def _loss_of_pairs(self) -> ContrastiveLoss:
        return self._objective.make_loss(self._ranks_per_node)

    def _forward_backward(self, inputs: StepInput) -> tuple[torch.Tensor, torch.Tensor | None]:
        model = self._model()
        last = len(inputs.micro_batches) - 1
        scale = self._loss_scale.value if self._loss_scale else None
        log_scale = model.log_scale

        def encode(batch: BertInput) -> torch.Tensor:
            autocast = torch.autocast(
                self._device.type, self._dtype, enabled=self._dtype != torch.float32, cache_enabled=False
            )
            with autocast, span_or_nothing(self._trace, "compute", "encode"):
                embeddings: torch.Tensor = self.engine.module(batch)
            return embeddings

        def loss(embeddings: list[torch.Tensor], log_scales: list[torch.Tensor]) -> torch.Tensor:
            queries, keys, positives = self._objective.split(embeddings)
            by = self._objective.scale_of(log_scales[0] if log_scales else None)
            with span_or_nothing(self._trace, "compute", "contrastive loss"):
                value: torch.Tensor = self._loss_of_pairs(queries, keys, positives, scale=by)
            return value

        value = cached_backward(
            encode,
            inputs.micro_batches,
            loss,
            self._device,
            around=lambda number: self.engine.micro_batch(number == last, scale),
            scale=scale,
            parameters=[] if log_scale is None else [log_scale],
        )
        texts = sum(len(batch.next_sentence_labels) for batch in inputs.micro_batches)
        return value * texts, None

    def _model(self) -> BertForEmbeddings:
        module = self.engine.module
        model = getattr(module, "module", module)  # DistributedDataParallel wraps it
        assert isinstance(model, BertForEmbeddings)
        return model


def made_up_pairs(batch: Batch, config: Config) -> Batch:
    """Random sequences as pairs: each is cut into texts of about the same length."""
    lengths = np.array(batch.lengths)
    texts_per_pair = config.texts_per_sample
    starts = np.asarray(batch.cu_seqlens[:-1], np.int64)[:, None]
    cuts = lengths[:, None] * np.arange(texts_per_pair) // texts_per_pair
    positions = (starts + cuts).ravel()
    return texts_of(replace(batch, masked_positions=positions, masked_labels=np.zeros_like(positions)))
