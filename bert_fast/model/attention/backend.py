"""What an attention backend is."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass

import torch

from bert_fast.model.attention.layout import SequenceLayout

Attention = Callable[[torch.Tensor, SequenceLayout, float], torch.Tensor]
"""(qkv [T, 3, H, K], layout, dropout probability) -> [T, H * K] of the same dtype."""


def _runs_anywhere(_device: torch.device, _dtype: torch.dtype) -> str:
    return ""


@dataclass(frozen=True)
class Backend:
    """A way to compute attention inside each sequence of a batch.

    compute:    what it does
    why_not:    (device, dtype) -> why it cannot run with them, as the rest of a sentence that begins with its name; empty if it
                can. Whether it has dropout is in `config.choices.ATTENTION_BACKENDS`, where a config is checked.
    reads_lengths_on_device: whether all it needs of the lengths is `layout.cu_seqlens` and `layout.max_len`, so that a captured
                CUDA graph can be replayed for other lengths
    """

    compute: Attention
    why_not: Callable[[torch.device, torch.dtype], str] = _runs_anywhere
    reads_lengths_on_device: bool = False

    def __call__(self, qkv_T3HK: torch.Tensor, layout: SequenceLayout, dropout: float) -> torch.Tensor:
        """The outcome of `compute`."""
        return self.compute(qkv_T3HK, layout, dropout)


def is_half(dtype: torch.dtype) -> bool:
    """Whether numbers have 16 bits, as flash kernels need it."""
    return dtype in (torch.bfloat16, torch.float16)


def is_installed(module: str) -> bool:
    """Whether a module can be imported, without doing so."""
    return importlib.util.find_spec(module) is not None
