"""Attention over sequences of different lengths that lie end to end, one call for every backend.

Shapes: T tokens of the batch, B sequences, H heads, K head width, G sequences of one group, L their longest length.

A backend is a function `(qkv_T3HK, layout, dropout) -> out_TD` in `BACKENDS`. `loop` is the oracle: one
scaled-dot-product attention a sequence. All must agree with it (tests/unit/model/test_attention.py).
"""

from __future__ import annotations

import functools
import importlib.util
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F

from bert_fast.errors import UserError
from bert_fast.model import fused

warnings.filterwarnings("ignore", "The PyTorch API of nested tensors is in prototype", UserWarning)


@dataclass(frozen=True)
class Group:
    """Sequences that are attended together: `count` of them from token `start` on, none longer than `longest`.

    If they are all of the same length the flat tokens are a rectangle already, and `index` and `mask` are None. Else
    `index` (int64, [count * longest]) picks their tokens into one (padding repeats the first token), `mask` (bool,
    [count, 1, 1, longest]) says which keys are real, and `places` (int64, [tokens of the group]) picks them back.
    """

    start: int
    end: int
    count: int
    longest: int
    index: torch.Tensor | None = None
    mask: torch.Tensor | None = None
    places: torch.Tensor | None = None


@dataclass
class SequenceLayout:
    """Where the sequences of a batch lie: host lengths, cumulative lengths on the device, cached groupings."""

    lengths: list[int]
    cu_seqlens: torch.Tensor
    block_mask: Any = None  # FlexAttention's, made at first use
    _groups: dict[tuple[float, int], list[Group]] = field(default_factory=dict)
    _rows: Group | None = None

    @property
    def max_len(self) -> int:
        return max(self.lengths)

    def groups(self, slack: float, multiple: int = 1) -> list[Group]:
        """Neighbouring sequences in groups.

        Args:
            slack: padding that a group may have, as a share of its tokens (lengths rounded up to `multiple`).
            multiple: rectangles are as wide as a multiple of this, so that kernels see few shapes.
        """
        key = (slack, multiple)
        if key not in self._groups:
            self._groups[key] = [
                self._group(start_token, members, multiple) for start_token, members in self._runs(slack, multiple)
            ]
        return self._groups[key]

    def packed_rows(self) -> Group:
        """All sequences in rows as wide as the longest, one after the other as they fit; `mask` is [rows, 1, L, L]."""
        if self._rows is None:
            width = self.max_len
            row, used, starts = 0, 0, []
            for length in self.lengths:
                if used + length > width:
                    row, used = row + 1, 0
                starts.append(row * width + used)
                used += length
            lengths = torch.tensor(self.lengths)
            owner = torch.repeat_interleave(torch.arange(len(lengths)), lengths)
            inside = torch.arange(len(owner)) - (torch.cumsum(lengths, 0) - lengths)[owner]
            places = torch.tensor(starts)[owner] + inside
            slots = torch.full(((row + 1) * width,), -1)
            slots[places] = owner
            index = torch.zeros_like(slots)
            index[places] = torch.arange(len(owner))
            table = slots.view(row + 1, 1, width)
            mask = (table.transpose(1, 2) == table)[:, None]
            device = self.cu_seqlens.device
            self._rows = Group(0, len(owner), row + 1, width, *(t.to(device) for t in (index, mask, places)))
        return self._rows

    def _runs(self, slack: float, multiple: int) -> list[tuple[int, list[int]]]:
        """(first token, lengths) of each group."""
        runs: list[tuple[int, list[int]]] = []
        token = start_token = widest = total = 0
        members: list[int] = []
        for length in self.lengths:
            rounded = _round_up(length, multiple)
            grown_widest, grown_total = max(widest, rounded), total + rounded
            if members and grown_widest * (len(members) + 1) > grown_total * (1 + slack):
                runs.append((start_token, members))
                members, start_token, widest, total = [length], token, rounded, rounded
            else:
                members, widest, total = [*members, length], grown_widest, grown_total
            token += length
        runs.append((start_token, members))
        return runs

    def _group(self, start_token: int, members: list[int], multiple: int) -> Group:
        longest, end = _round_up(max(members), multiple), start_token + sum(members)
        if min(members) == longest:
            return Group(start_token, end, len(members), longest)
        lengths = torch.tensor(members)  # on the host: asking the device for its nonzero() would wait for it
        starts = torch.cumsum(lengths, 0) - lengths
        column = torch.arange(longest)
        real = column[None, :] < lengths[:, None]
        index = torch.where(real, starts[:, None] + column[None, :], 0).flatten()
        places = real.flatten().nonzero()[:, 0]
        tensors = (index, real[:, None, None, :], places)
        device = self.cu_seqlens.device
        if device.type == "cuda":
            tensors = tuple(t.pin_memory().to(device, non_blocking=True) for t in tensors)  # type: ignore[assignment]
        return Group(start_token, end, len(members), longest, *tensors)


def _round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple


Backend = Callable[[torch.Tensor, SequenceLayout, float], torch.Tensor]
Dense = Callable[[torch.Tensor, torch.Tensor | None, float], torch.Tensor]


def _dense(qkv_GL3HK: torch.Tensor, mask: torch.Tensor | None, dropout: float) -> torch.Tensor:
    """Attention inside a rectangle of sequences; returns [G, L, H * K]."""
    query, key, value = qkv_GL3HK.permute(2, 0, 3, 1, 4)  # each [G, H, L, K]
    out_GHLK = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, dropout_p=dropout)
    return out_GHLK.transpose(1, 2).flatten(2)


def _explicit(qkv_GL3HK: torch.Tensor, mask: torch.Tensor | None, dropout: float) -> torch.Tensor:
    """The same by two batched products and a softmax.

    On CPUs, for lengths up to 512, three to four times faster than the fused kernel, whose backward is slow there.
    """
    if fused.fuses(qkv_GL3HK):
        return fused.attention(qkv_GL3HK, mask, dropout)
    query, key, value = qkv_GL3HK.permute(2, 0, 3, 1, 4)
    scores_GHLL = (query * query.shape[-1] ** -0.5) @ key.transpose(-1, -2)
    if mask is not None:
        # In place: the product keeps its factors for backward, not its result; and adding needs no backward of its own.
        scores_GHLL += torch.zeros_like(mask, dtype=scores_GHLL.dtype).masked_fill_(~mask, float("-inf"))
    weights_GHLL = scores_GHLL.softmax(-1)
    if dropout > 0:
        weights_GHLL = F.dropout(weights_GHLL, dropout)
    return (weights_GHLL @ value).transpose(1, 2).flatten(2)


def _loop(qkv_T3HK: torch.Tensor, layout: SequenceLayout, dropout: float) -> torch.Tensor:
    pieces = [_dense(piece[None], None, dropout)[0] for piece in qkv_T3HK.split(layout.lengths)]
    return torch.cat(pieces)


def _by_groups(qkv_T3HK: torch.Tensor, groups: list[Group], dropout: float, dense: Dense = _dense) -> torch.Tensor:
    pieces = []
    for group, tokens in zip(groups, qkv_T3HK.split([g.end - g.start for g in groups]), strict=True):
        if group.index is None:
            rectangle = tokens.unflatten(0, (group.count, group.longest))
            pieces.append(dense(rectangle, None, dropout).flatten(0, 1))
        else:
            rectangle = tokens.index_select(0, group.index).unflatten(0, (group.count, group.longest))
            out = dense(rectangle, group.mask, dropout).flatten(0, 1)
            pieces.append(out.index_select(0, group.places))  # type: ignore[arg-type]
    return pieces[0] if len(pieces) == 1 else torch.cat(pieces)


def _grouped(qkv_T3HK: torch.Tensor, layout: SequenceLayout, dropout: float) -> torch.Tensor:
    return _by_groups(qkv_T3HK, layout.groups(0.15), dropout)


def _matmul(qkv_T3HK: torch.Tensor, layout: SequenceLayout, dropout: float) -> torch.Tensor:
    return _by_groups(qkv_T3HK, layout.groups(0.05, multiple=16), dropout, _explicit)


def _padded(qkv_T3HK: torch.Tensor, layout: SequenceLayout, dropout: float) -> torch.Tensor:
    return _by_groups(qkv_T3HK, layout.groups(float("inf")), dropout)


def _block_diagonal(qkv_T3HK: torch.Tensor, layout: SequenceLayout, dropout: float) -> torch.Tensor:
    """Sequences packed into rows as wide as the longest; a query sees the keys of its own sequence."""
    rows = layout.packed_rows()
    rectangle = qkv_T3HK.index_select(0, rows.index).unflatten(0, (rows.count, rows.longest))
    return _dense(rectangle, rows.mask, dropout).flatten(0, 1).index_select(0, rows.places)  # type: ignore[arg-type]


def _nested(qkv_T3HK: torch.Tensor, layout: SequenceLayout, dropout: float) -> torch.Tensor:
    """Torch's nested (jagged) tensors: exact and slow on CPUs, an oracle."""
    offsets = layout.cu_seqlens.long()
    lengths = {"min_seqlen": min(layout.lengths), "max_seqlen": layout.max_len}
    query, key, value = (
        torch.nested.nested_tensor_from_jagged(part.contiguous(), offsets, **lengths).transpose(1, 2)
        for part in qkv_T3HK.unbind(1)
    )
    return F.scaled_dot_product_attention(query, key, value, dropout_p=dropout).transpose(1, 2).values().flatten(1)


def _flex(qkv_T3HK: torch.Tensor, layout: SequenceLayout, dropout: float) -> torch.Tensor:
    """FlexAttention over all tokens as one row, the blocks outside of the sequences skipped."""
    from torch.nn.attention.flex_attention import create_block_mask

    tokens = len(qkv_T3HK)
    if layout.block_mask is None:
        owner_T = torch.bucketize(torch.arange(tokens, device=qkv_T3HK.device), layout.cu_seqlens[1:], right=True)
        layout.block_mask = create_block_mask(
            lambda _b, _h, query, key: owner_T[query] == owner_T[key], None, None, tokens, tokens,
            device=str(qkv_T3HK.device),
        )  # fmt: skip
    query, key, value = (part.transpose(0, 1)[None] for part in qkv_T3HK.unbind(1))  # each [1, H, T, K]
    return _compiled_flex()(query, key, value, block_mask=layout.block_mask)[0].transpose(0, 1).flatten(1)


@functools.cache
def _compiled_flex() -> Callable[..., torch.Tensor]:
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=True)


def _varlen(qkv_T3HK: torch.Tensor, layout: SequenceLayout, dropout: float) -> torch.Tensor:
    from torch.nn.attention.varlen import varlen_attn

    query, key, value = (part.contiguous() for part in qkv_T3HK.unbind(1))
    cu_seqlens, longest = layout.cu_seqlens, layout.max_len
    return varlen_attn(query, key, value, cu_seqlens, cu_seqlens, longest, longest).flatten(1)


def _flash(qkv_T3HK: torch.Tensor, layout: SequenceLayout, dropout: float) -> torch.Tensor:
    from flash_attn import flash_attn_varlen_qkvpacked_func

    return flash_attn_varlen_qkvpacked_func(qkv_T3HK, layout.cu_seqlens, layout.max_len, dropout).flatten(1)


def _torch_flash(qkv_T3HK: torch.Tensor, layout: SequenceLayout, dropout: float) -> torch.Tensor:
    """The kernel under `varlen`, called as an operator: so it has dropout, and reads q, k and v where they lie."""
    query, key, value = qkv_T3HK.unbind(1)
    cu_seqlens, longest = layout.cu_seqlens, layout.max_len
    out_THK, *_ = torch.ops.aten._flash_attention_forward(
        query, key, value, cu_seqlens, cu_seqlens, longest, longest, dropout, False, False
    )
    return out_THK.flatten(1)


BACKENDS: dict[str, Backend] = {
    "loop": _loop,
    "grouped": _grouped,
    "matmul": _matmul,
    "padded": _padded,
    "block_diagonal": _block_diagonal,
    "nested": _nested,
    "flex": _flex,
    "varlen": _varlen,
    "torch_flash": _torch_flash,
    "flash": _flash,
}


def choose_backend(name: str, device: torch.device, dtype: torch.dtype, dropout: float) -> str:
    """Resolve `auto`, and refuse what this machine or dtype does not have. Never replaces a named backend.

    Raises:
        UserError: the named backend cannot run here; the text says which can.
    """
    half = dtype in (torch.bfloat16, torch.float16)
    has_flash = importlib.util.find_spec("flash_attn") is not None
    has_varlen = importlib.util.find_spec("torch.nn.attention.varlen") is not None
    if name == "auto":
        if device.type == "cpu":
            return "matmul"
        if half and has_flash:
            return "flash"
        if half and dropout == 0 and has_varlen:
            return "varlen"
        return "nested" if half else "grouped"  # nested tensors reach torch's own flash kernel, with dropout
    if name == "flex" and device.type != "cuda":
        raise UserError(
            f"model.attention_backend=flex has no backward on {device.type}; use matmul, grouped, loop or padded"
        )
    if name in ("varlen", "torch_flash", "flash"):
        if device.type != "cuda" or not half:
            raise UserError(
                f"model.attention_backend={name} needs CUDA and bf16 or fp16, this run is {device.type} with {dtype}; "
                "use matmul, grouped, loop or padded"
            )
        if name == "flash" and not has_flash:
            raise UserError("model.attention_backend=flash: package flash-attn is not installed; use auto or grouped")
    if name in ("varlen", "flex") and dropout > 0:
        raise UserError(f"model.attention_backend={name} has no dropout; set model.attention_dropout=0")
    return name
