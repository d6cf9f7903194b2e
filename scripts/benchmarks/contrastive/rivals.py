"""Losses of the same batch by other means: functions from queries, keys [B, d] and a scale to the loss, 0-dim.

`open_clip` and `sentence_transformers` are other people's packages, which nothing else here needs:

    pip install --no-deps open_clip_torch==3.3.0 && pip install sentence-transformers==6.2.0
"""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from bert_fast.contrastive.loss import ContrastiveLoss
from bert_fast.contrastive.options import LossOptions
from bert_fast.errors import UserError

_CHUNK = 512  # its default of 32 rows takes four times as long
Loss = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


def ours(queries: torch.Tensor, keys: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    loss: torch.Tensor = _module("fp32")(queries, keys, scale=scale)
    return loss


def ours_bf16(queries: torch.Tensor, keys: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    loss: torch.Tensor = _module("bf16")(queries, keys, scale=scale)
    return loss


@functools.cache
def _module(precision: str) -> ContrastiveLoss:
    return ContrastiveLoss(LossOptions(precision=precision))


def full_logits(queries: torch.Tensor, keys: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """One matrix of scores, its rows and its columns."""
    scores, labels = scale * queries @ keys.T, torch.arange(len(queries), device=queries.device)
    return (F.cross_entropy(scores, labels) + F.cross_entropy(scores.T, labels)) / 2


def linear_cross_entropy(queries: torch.Tensor, keys: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """torch's chunked linear layer with cross entropy, in either direction."""
    labels = torch.arange(len(queries), device=queries.device)
    one = F.linear_cross_entropy(scale * queries, keys, labels)
    other = F.linear_cross_entropy(scale * keys, queries, labels)
    return (one + other) / 2


def open_clip(queries: torch.Tensor, keys: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """CLIP's loss as open_clip has it; in one process `local_loss` and `gather_with_grad` change nothing."""
    loss: torch.Tensor = _clip_loss()(queries, keys, scale)
    return loss


@functools.cache
def _clip_loss() -> Any:
    found = importlib.util.find_spec("open_clip")
    if found is None or found.origin is None:
        raise UserError("open_clip is not installed; pip install --no-deps open_clip_torch==3.3.0")
    # The file alone: the package imports torchvision
    spec = importlib.util.spec_from_file_location("open_clip_loss", Path(found.origin).with_name("loss.py"))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.ClipLoss(local_loss=True, gather_with_grad=True)


def sentence_transformers(queries: torch.Tensor, keys: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """The part of CachedMultipleNegativesRankingLoss that is the loss, in both directions: chunks of rows.

    It takes each chunk's gradients at once, so that the value has none.
    """
    loss: torch.Tensor = _cached_loss(float(scale)).calculate_loss([[queries], [keys]], with_backward=True)
    return loss


@functools.cache
def _cached_loss(scale: float) -> Any:
    try:
        from sentence_transformers import SentenceTransformer
        from sentence_transformers.losses import CachedMultipleNegativesRankingLoss
        from sentence_transformers.util import dot_score
    except ImportError as error:
        raise UserError(f"sentence_transformers: {error}; pip install sentence-transformers==6.2.0") from None
    return CachedMultipleNegativesRankingLoss(
        SentenceTransformer(modules=[torch.nn.Identity()]),
        scale=scale,
        similarity_fct=dot_score,
        mini_batch_size=_CHUNK,
        directions=("query_to_doc", "doc_to_query"),
        partition_mode="per_direction",
    )


RIVALS: dict[str, Loss] = {
    "ours": ours,
    "ours_bf16": ours_bf16,
    "full_logits": full_logits,
    "linear_cross_entropy": linear_cross_entropy,
    "open_clip": open_clip,
    "sentence_transformers": sentence_transformers,
}
