"""Flash attention for variable lengths: torch's kernel by two ways, and the package flash-attn."""

from __future__ import annotations

import torch

from bert_fast.model.attention.backend import Backend, is_half, is_installed
from bert_fast.model.attention.layout import SequenceLayout


def _varlen(qkv_T3HK: torch.Tensor, layout: SequenceLayout, dropout: float) -> torch.Tensor:
    from torch.nn.attention.varlen import varlen_attn

    query, key, value = (part.contiguous() for part in qkv_T3HK.unbind(1))
    cu_seqlens, longest = layout.cu_seqlens, layout.max_len
    out_THK = varlen_attn(query, key, value, cu_seqlens, cu_seqlens, longest, longest)
    assert isinstance(out_THK, torch.Tensor), "a tuple comes only where log-sum-exps are asked for"
    return out_THK.flatten(1)


def _torch_flash(qkv_T3HK: torch.Tensor, layout: SequenceLayout, dropout: float) -> torch.Tensor:
    """The kernel under `varlen`, called as an operator: so it has dropout, and reads q, k and v where they lie."""
    query, key, value = qkv_T3HK.unbind(1)
    cu_seqlens, longest = layout.cu_seqlens, layout.max_len
    out_THK, *_ = torch.ops.aten._flash_attention_forward(
        query, key, value, cu_seqlens, cu_seqlens, longest, longest, dropout, False, False
    )
    return out_THK.flatten(1)


def _flash(qkv_T3HK: torch.Tensor, layout: SequenceLayout, dropout: float) -> torch.Tensor:
    from flash_attn import flash_attn_varlen_qkvpacked_func

    return flash_attn_varlen_qkvpacked_func(qkv_T3HK, layout.cu_seqlens, layout.max_len, dropout).flatten(1)


def _why_not_torchs(device: torch.device, dtype: torch.dtype) -> str:
    if device.type == "cuda" and is_half(dtype):
        return ""
    return f"needs CUDA and bf16 or fp16, this run is {device.type} with {dtype}; use matmul, grouped, loop or padded"


def _why_not_varlen(device: torch.device, dtype: torch.dtype) -> str:
    why = _why_not_torchs(device, dtype)
    if not why and not is_installed("torch.nn.attention.varlen"):
        why = "needs torch.nn.attention.varlen, which this torch does not have; use auto or grouped"
    return why


def _why_not_package(device: torch.device, dtype: torch.dtype) -> str:
    why = _why_not_torchs(device, dtype)
    if not why and not is_installed("flash_attn"):
        why = "needs the package flash-attn, which is not installed; use auto or grouped"
    return why


VARLEN = Backend(_varlen, _why_not_varlen, reads_lengths_on_device=True)
TORCH_FLASH = Backend(_torch_flash, _why_not_torchs, reads_lengths_on_device=True)
FLASH = Backend(_flash, _why_not_package, reads_lengths_on_device=True)
