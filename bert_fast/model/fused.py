"""Fused parts of the encoder for CPUs: dropout that stores no mask, and layers that keep less for backward.

Dropout on a CPU is slow in torch: one scalar draw per element, a fifth of a step. Here a vectorized generator draws the bits of
each element, and integer arithmetic turns them into a factor, 0 or 1 / (1 - p). Backward draws them again from the seed, so
that no mask is kept. The seed comes from torch's generator, so torch's state alone is enough to repeat or resume a run.

Every function has a plain twin in `bert.py` or `attention/rectangles.py`, which other devices and `torch.compile` use.

Shapes: T tokens, D hidden width, F feed-forward width; G sequences of one group, L their length, H heads, K head width.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensor

from bert_fast.integers import ceil_div

# Random bits that decide about an element: p is met to within 2^-16.
_DRAW_BITS = 15
_INTEGER = {2: torch.int16, 4: torch.int32, 8: torch.int64}


_enabled = True


def fuses(x: torch.Tensor) -> bool:
    """Whether these functions are used for `x`: on CPUs, outside of `torch.compile`, which fuses by itself."""
    return _enabled and x.device.type == "cpu" and not torch.compiler.is_compiling()


@contextmanager
def turned_off() -> Iterator[None]:
    """Use the plain counterparts inside the block: for tests, and to measure what fusing gains."""
    global _enabled
    before, _enabled = _enabled, False
    try:
        yield
    finally:
        _enabled = before


def draw_seed() -> int:
    """A seed for one dropout, drawn from torch's generator. Fake tensors, which have sizes alone, have no random numbers."""
    seed = torch.randint(0, 2**62, ())
    return 0 if isinstance(seed, FakeTensor) else int(seed)


def dropout_factor(shape: torch.Size, dtype: torch.dtype, p: float, seed: int) -> torch.Tensor:
    """A CPU tensor of 0 with probability p and 1 / (1 - p) otherwise; the same for the same seed.

    The probability is rounded to a multiple of 2^-15, and the factor belongs to the rounded one.
    """
    empty = torch.empty(0, dtype=dtype)
    if isinstance(empty, FakeTensor):
        return empty.new_empty(shape)
    count = math.prod(shape)
    threshold = round(p * 2**_DRAW_BITS)
    integer = _INTEGER[dtype.itemsize]
    per_draw = 8 // dtype.itemsize
    raw = np.random.SFC64(seed).random_raw(ceil_div(count, per_draw))
    bits = torch.from_numpy(raw).view(integer)[:count]
    keep = torch.tensor(2**_DRAW_BITS / (2**_DRAW_BITS - threshold), dtype=dtype).view(integer)
    bits.bitwise_and_(2**_DRAW_BITS - 1)
    # threshold - 1 - draw is negative for elements that are kept: its sign, spread over all bits, is the mask of the factor
    bits.neg_().add_(threshold - 1).bitwise_right_shift_(8 * dtype.itemsize - 1).bitwise_and_(keep)
    return bits.view(dtype).view(shape)


class _Dropout(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, p: float) -> torch.Tensor:
        ctx.p, ctx.seed = p, draw_seed()
        return x * dropout_factor(x.shape, x.dtype, p, ctx.seed)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        return grad * dropout_factor(grad.shape, grad.dtype, ctx.p, ctx.seed), None


def dropout(x: torch.Tensor, p: float) -> torch.Tensor:
    """`F.dropout(x, p)` for any shape."""
    return _Dropout.apply(x, p) if p > 0 else x


class _DropoutAddNorm(torch.autograd.Function):
    """LayerNorm(residual + dropout(x)); keeps the sum and two numbers per row."""

    @staticmethod
    def forward(
        ctx: Any,
        x_TD: torch.Tensor,
        residual_TD: torch.Tensor,
        weight_D: torch.Tensor,
        bias_D: torch.Tensor,
        eps: float,
        p: float,
    ) -> torch.Tensor:
        ctx.p, ctx.seed = p, draw_seed() if p > 0 else 0
        if p > 0:
            sum_TD = torch.addcmul(residual_TD, x_TD, dropout_factor(x_TD.shape, x_TD.dtype, p, ctx.seed))
        else:
            sum_TD = residual_TD + x_TD
        out_TD, mean, rstd = torch.native_layer_norm(sum_TD, weight_D.shape, weight_D, bias_D, eps)
        ctx.save_for_backward(sum_TD, mean, rstd, weight_D, bias_D)
        return out_TD

    @staticmethod
    def backward(ctx: Any, grad_TD: torch.Tensor) -> tuple[Any, ...]:
        sum_TD, mean, rstd, weight_D, bias_D = ctx.saved_tensors
        d_sum_TD, d_weight, d_bias = torch.ops.aten.native_layer_norm_backward(
            grad_TD, sum_TD, weight_D.shape, mean, rstd, weight_D, bias_D, [True, True, True]
        )
        d_x_TD = d_sum_TD
        if ctx.p > 0:
            d_x_TD = dropout_factor(grad_TD.shape, d_sum_TD.dtype, ctx.p, ctx.seed).mul_(d_sum_TD)
        return d_x_TD, d_sum_TD, d_weight, d_bias, None, None


def dropout_add_norm(x_TD: torch.Tensor, residual_TD: torch.Tensor, norm: torch.nn.LayerNorm, p: float) -> torch.Tensor:
    """`norm(residual + F.dropout(x, p))`, [T, D]."""
    return _DropoutAddNorm.apply(x_TD, residual_TD, norm.weight, norm.bias, norm.eps, p)


class _GeluLinear(torch.autograd.Function):
    """linear(gelu(x)); keeps only x and computes gelu(x) again for the weight's gradient."""

    @staticmethod
    def forward(ctx: Any, x_TF: torch.Tensor, weight_DF: torch.Tensor, bias_D: torch.Tensor, form: str) -> torch.Tensor:
        ctx.form = form
        ctx.save_for_backward(x_TF, weight_DF)
        return F.linear(F.gelu(x_TF, approximate=form), weight_DF, bias_D)

    @staticmethod
    def backward(ctx: Any, grad_TD: torch.Tensor) -> tuple[Any, ...]:
        x_TF, weight_DF = ctx.saved_tensors
        d_weight = grad_TD.t() @ F.gelu(x_TF, approximate=ctx.form)
        d_inner = grad_TD @ weight_DF
        return torch.ops.aten.gelu_backward(d_inner, x_TF, approximate=ctx.form), d_weight, grad_TD.sum(0), None


def gelu_linear(x_TF: torch.Tensor, linear: torch.nn.Linear, form: str) -> torch.Tensor:
    """`linear(F.gelu(x, approximate=form))`, [T, F] to [T, D]."""
    dtype = x_TF.dtype  # autocast does not reach into backward, so the weights are cast here
    return _GeluLinear.apply(x_TF, linear.weight.to(dtype), linear.bias.to(dtype), form)


class _Attention(torch.autograd.Function):
    """Softmax attention inside a rectangle of sequences as two batched products; keeps qkv and the probabilities."""

    @staticmethod
    def forward(ctx: Any, qkv_GL3HK: torch.Tensor, mask: torch.Tensor | None, p: float) -> torch.Tensor:
        query, key, value = qkv_GL3HK.permute(2, 0, 3, 1, 4)  # each [G, H, L, K]
        scores_GHLL = (query * query.shape[-1] ** -0.5) @ key.transpose(-1, -2)
        if mask is not None:
            scores_GHLL += torch.zeros_like(mask, dtype=scores_GHLL.dtype).masked_fill_(~mask, float("-inf"))
        weights_GHLL = scores_GHLL.softmax(-1)
        ctx.p, ctx.seed = p, draw_seed() if p > 0 else 0
        ctx.save_for_backward(qkv_GL3HK, weights_GHLL)
        return (_dropped(weights_GHLL, ctx.p, ctx.seed) @ value).transpose(1, 2).flatten(2)

    @staticmethod
    def backward(ctx: Any, grad_GLD: torch.Tensor) -> tuple[Any, ...]:
        qkv_GL3HK, weights_GHLL = ctx.saved_tensors
        query, key, value = qkv_GL3HK.permute(2, 0, 3, 1, 4)
        scale = query.shape[-1] ** -0.5
        grad_GHLK = grad_GLD.unflatten(-1, query.shape[1::2]).transpose(1, 2)
        factor = dropout_factor(weights_GHLL.shape, weights_GHLL.dtype, ctx.p, ctx.seed) if ctx.p > 0 else None
        d_weights = grad_GHLK @ value.transpose(-1, -2)
        if factor is not None:
            d_weights *= factor
            factor *= weights_GHLL
        d_value = (weights_GHLL if factor is None else factor).transpose(-1, -2) @ grad_GHLK
        d_scores = torch._softmax_backward_data(d_weights, weights_GHLL, -1, weights_GHLL.dtype).mul_(scale)
        d_qkv = torch.empty_like(qkv_GL3HK)
        d_query, d_key, d_value_out = d_qkv.permute(2, 0, 3, 1, 4)
        d_query.copy_(d_scores @ key)
        d_key.copy_(d_scores.transpose(-1, -2) @ query)
        d_value_out.copy_(d_value)
        return d_qkv, None, None


def _dropped(weights: torch.Tensor, p: float, seed: int) -> torch.Tensor:
    if p <= 0:
        return weights
    return dropout_factor(weights.shape, weights.dtype, p, seed).mul_(weights)


def attention(qkv_GL3HK: torch.Tensor, mask: torch.Tensor | None, p: float) -> torch.Tensor:
    """Attention inside a rectangle [G, L, 3, H, K] of sequences, keys masked by bool [G, 1, 1, L]. Returns [G, L, H * K]."""
    return _Attention.apply(qkv_GL3HK, mask, p)
