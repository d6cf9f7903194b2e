"""The contrastive objective of a run: its model, its loss, and how embeddings of a batch become queries and keys."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from bert_fast.config import ContrastiveConfig, ModelConfig
from bert_fast.contrastive.loss import ContrastiveLoss, learned_scale
from bert_fast.contrastive.model import BertForEmbeddings
from bert_fast.contrastive.options import LossOptions


class Contrastive:
    """An entry of `OBJECTIVES`; an `Objective` but for `loss`, which is one of all micro-batches together."""

    def __init__(self, config: ContrastiveConfig) -> None:
        self.config = config
        self.texts_per_pair = 2 + config.negatives

    def build_model(self, config: ModelConfig, attention_backend: str) -> BertForEmbeddings:
        return BertForEmbeddings(config, attention_backend, self.config)

    def loss(self, output: object, global_masked: object, global_samples: object) -> torch.Tensor:
        raise TypeError("the contrastive loss is of all micro-batches: train/contrastive_step.py")

    def options(self) -> LossOptions:
        """Of the loss."""
        config = self.config
        return LossOptions(
            symmetric=config.symmetric,
            query_query=config.query_query,
            key_key=config.key_key,
            margin=config.margin,
            widths=config.widths,
            weights=config.width_weights,
            precision=config.loss_precision,
            gradients="mean",  # engines average over ranks
        )

    def make_loss(self, ranks_per_node: int | None) -> ContrastiveLoss:
        """The loss of this rank's process group. `ranks_per_node`: of the run; read where the ring goes by nodes."""
        return ContrastiveLoss(
            self.options(),
            scale=self.config.scale,
            max_scale=self.config.max_scale,
            ranks_per_node=ranks_per_node if self.config.ring_by_node else None,
            tile=self.config.tile,
        )

    def scale_of(self, log_scale: torch.Tensor | None) -> torch.Tensor:
        """1 / temperature, 0-dim; a learned one that has come to be above its bound is set to it."""
        if log_scale is None:
            return torch.tensor(self.config.scale)
        return learned_scale(log_scale, self.config.max_scale).squeeze()

    def split(self, embeddings: Sequence[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Queries [b, d], keys [b x (1 + negatives), d], and each query's key (int64 [b]), of all micro-batches."""
        every = torch.cat(list(embeddings)).unflatten(0, (-1, self.texts_per_pair))
        keys = every[:, 1:].flatten(0, 1)
        positives = torch.arange(0, len(keys), self.texts_per_pair - 1, device=keys.device)
        return every[:, 0], keys, positives
