"""Attention by torch's nested (jagged) tensors."""

from __future__ import annotations

import warnings

import torch
import torch.nn.functional as F

from bert_fast.model.attention.backend import Backend
from bert_fast.model.attention.layout import SequenceLayout

warnings.filterwarnings("ignore", "The PyTorch API of nested tensors is in prototype", UserWarning)


def _nested(qkv_T3HK: torch.Tensor, layout: SequenceLayout, dropout: float) -> torch.Tensor:
    """Exact, and slow on CPUs; on CUDA in 16 bits it reaches torch's own flash kernel, with dropout."""
    offsets = layout.cu_seqlens.long()
    shortest, longest = min(layout.lengths), layout.max_len
    query, key, value = (
        torch.nested.nested_tensor_from_jagged(
            part.contiguous(), offsets, min_seqlen=shortest, max_seqlen=longest
        ).transpose(1, 2)
        for part in qkv_T3HK.unbind(1)
    )
    return F.scaled_dot_product_attention(query, key, value, dropout_p=dropout).transpose(1, 2).values().flatten(1)


NESTED = Backend(_nested)
