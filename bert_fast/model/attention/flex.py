"""FlexAttention, compiled."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch

from bert_fast.model.attention.backend import Backend
from bert_fast.model.attention.layout import SequenceLayout


def _flex(qkv_T3HK: torch.Tensor, layout: SequenceLayout, dropout: float) -> torch.Tensor:
    """FlexAttention over all tokens as one row, the blocks outside of the sequences skipped."""
    from torch.nn.attention.flex_attention import create_block_mask

    tokens = len(qkv_T3HK)
    if layout.block_mask is None:
        owner_T = torch.bucketize(torch.arange(tokens, device=qkv_T3HK.device), layout.cu_seqlens[1:], right=True)
        layout.block_mask = create_block_mask(
            lambda _b, _h, query, key: owner_T[query] == owner_T[key],
            None,
            None,
            tokens,
            tokens,
            device=str(qkv_T3HK.device),
        )
    query, key, value = (part.transpose(0, 1)[None] for part in qkv_T3HK.unbind(1))  # each [1, H, T, K]
    return _compiled_flex()(query, key, value, block_mask=layout.block_mask)[0].transpose(0, 1).flatten(1)


@functools.cache
def _compiled_flex() -> Callable[..., torch.Tensor]:
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=True)


def _why_not(device: torch.device, _dtype: torch.dtype) -> str:
    if device.type == "cuda":
        return ""
    return f"has no backward on {device.type}; use matmul, grouped, loop or padded"


FLEX = Backend(_flex, _why_not)
