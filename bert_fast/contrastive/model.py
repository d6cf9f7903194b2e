"""BERT's encoder with a pooled, normalized embedding of each text in place of its heads for pretraining."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import nn

from bert_fast.config import ContrastiveConfig, ModelConfig
from bert_fast.model.bert import BertForPretraining, BertInput


class ScaleHead(nn.Module):
    """What the loss has to learn beside the encoder: the logarithm of its scale, where it is learned."""

    def __init__(self, config: ContrastiveConfig) -> None:
        super().__init__()
        if config.learn_scale:
            self.log_scale = nn.Parameter(torch.tensor([math.log(config.scale)]))


class BertForEmbeddings(BertForPretraining):
    """`forward` gives the embeddings of a batch's texts, fp32 [texts, D].

    A batch has a sequence for each text, and `masked_positions` are where they begin (data/pairs/batch.py). With
    Matryoshka's widths embeddings are not normalized: the loss divides each width by its own length.
    """

    def __init__(self, config: ModelConfig, backend: str, contrastive: ContrastiveConfig) -> None:
        super().__init__(config, backend)
        self._contrastive = contrastive
        self.heads = ScaleHead(contrastive)  # type: ignore[assignment]

    @property
    def log_scale(self) -> nn.Parameter | None:
        """Of the loss; None: the scale is not learned."""
        return getattr(self.heads, "log_scale", None)

    def read_rows(self, batch: BertInput) -> torch.Tensor | None:
        return self._starts(batch) if self._contrastive.pooling == "cls" else None

    def _starts(self, batch: BertInput) -> torch.Tensor:
        return batch.masked_positions[: len(batch.next_sentence_labels)]  # further ones are padding

    # The outcome of another objective than the base class's
    def forward(self, batch: BertInput, with_accuracy: bool = False) -> torch.Tensor:  # type: ignore[override]
        hidden = self.encode(batch, self.read_rows(batch)).float()
        pooled = hidden if self._contrastive.pooling == "cls" else self._means(hidden, batch)
        return pooled if self._contrastive.widths else F.normalize(pooled, dim=1)

    def _means(self, hidden_TD: torch.Tensor, batch: BertInput) -> torch.Tensor:
        """Over the tokens of each text, [texts, D]."""
        num = len(batch.next_sentence_labels)
        lengths = torch.tensor(batch.layout.lengths[:num], device=hidden_TD.device)
        tokens = sum(batch.layout.lengths[:num])
        texts = torch.repeat_interleave(torch.arange(num, device=hidden_TD.device), lengths, output_size=tokens)
        sums = hidden_TD.new_zeros(num, hidden_TD.shape[1]).index_add(0, texts, hidden_TD[:tokens])
        return sums / lengths[:, None]
