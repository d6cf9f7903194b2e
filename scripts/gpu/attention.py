"""Stage `attention`: every backend forward and backward against the loop in fp64; time and memory at BERT-large's width."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import numpy as np
import torch

from bert_fast.balance.lengths import wikipedia_like
from bert_fast.config.choices import ATTENTION_BACKENDS
from bert_fast.errors import UserError
from bert_fast.model.attention import SequenceLayout, choose_backend, find_backend

from .stage import CheckFailed, Context, NotAvailable
from .timing import median_seconds, peak_mib, reset_peak

_LENGTHS = (1, 2, 3, 7, 16, 17, 31, 64, 65, 127, 128, 129, 200, 255, 256, 257, 384, 511, 512)
_DRAWS, _TINY_DRAWS = 48, 12  # of dropout, for a mean
_P = 0.1
# Relative error |computed - exact| / |exact| that a format may have
_TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 2e-2, torch.float16: 3e-3, torch.float64: 1e-10}


@dataclass
class Case:
    """One batch of sequences: numbers that every backend gets, and the exact outcome without dropout."""

    qkv: torch.Tensor  # [T, 3, H, K]
    grad: torch.Tensor  # [T, H * K], of the output
    lengths: list[int]

    def layout(self) -> SequenceLayout:
        ends = np.concatenate([[0], np.cumsum(self.lengths)]).astype(np.int32)
        return SequenceLayout(list(self.lengths), torch.from_numpy(ends).to(self.qkv.device))

    def compute(self, backend: str, dtype: torch.dtype, dropout: float = 0.0) -> tuple[torch.Tensor, torch.Tensor]:
        """Output [T, D] and gradient [T, 3, H, K] of a backend."""
        qkv = self.qkv.to(dtype, copy=True).requires_grad_()
        out_TD = find_backend(backend)(qkv, self.layout(), dropout)
        (gradient,) = torch.autograd.grad(out_TD, qkv, self.grad.to(dtype))
        return out_TD.detach(), gradient


def make_case(lengths: list[int], heads: int, dtype: torch.dtype, device: str) -> Case:
    generator = torch.Generator(device).manual_seed(1)
    tokens = sum(lengths)
    qkv = torch.randn(tokens, 3, heads, 64, device=device, generator=generator).to(dtype)
    grad = torch.randn(tokens, heads * 64, device=device, generator=generator).to(dtype)
    return Case(qkv, grad, lengths)


def run(context: Context) -> None:
    result, device = context.result, torch.device(context.device)
    dtypes = (torch.float32,) if context.tiny else (torch.bfloat16, torch.float16)
    heads = 2 if context.tiny else 16
    lengths = [n for n in _LENGTHS if not context.tiny or n <= 65]
    names = [name for name in ATTENTION_BACKENDS if name not in ("torch_flash", "flex")]
    names += ["torch_flash", "flex"]  # a fault of these may take the whole process with it
    draws = _TINY_DRAWS if context.tiny else _DRAWS
    cases = {dtype: make_case(lengths, heads, dtype, context.device) for dtype in dtypes}
    agreed = 0
    for name in names:
        for dtype in dtypes:
            label = f"{name} {str(dtype).removeprefix('torch.')}"
            case = cases[dtype]
            if context.has_time(3, label):
                agreed += context.case(label, partial(check_agreement, case, name, dtype, device))
            if context.has_time(3, f"{label} with dropout"):
                context.case(f"{label} with dropout", partial(check_dropout, case, name, dtype, device, draws))
    samples = 4 if context.tiny else 56
    timed = make_case(
        [max(2, int(n) // (8 if context.tiny else 1)) for n in -np.sort(-wikipedia_like(samples).astype(int))],
        heads,
        dtypes[0],
        context.device,
    )
    for name in names:
        for dropout in (0.0, _P):
            label = f"time of {name}, dropout {dropout:g}"
            if context.has_time(2, label):
                context.case(label, partial(_timed, context, timed, name, dtypes[0], dropout, device))
    times = {k: v for k, v in result.metrics.items() if k.startswith("attention_ms/")}
    fastest = min(times, key=lambda k: times[k], default="")
    result.summary = (
        f"{agreed} of {len(names) * len(dtypes)} agree with fp64; fastest {fastest.removeprefix('attention_ms/')}"
    )


def _require(name: str, device: torch.device, dtype: torch.dtype, dropout: float) -> None:
    try:
        choose_backend(name, device, dtype, dropout)
    except UserError as missing:
        raise NotAvailable(str(missing)) from None


def _gap(computed: torch.Tensor, exact: torch.Tensor) -> float:
    return float((computed.double() - exact).norm() / exact.norm())


def check_agreement(case: Case, name: str, dtype: torch.dtype, device: torch.device) -> None:
    """Output and gradient of the backend `name` in `dtype` are those of the loop in fp64, to the rounding of `dtype`.

    Raises:
        CheckFailed: one is not.
        NotAvailable: the device cannot run this backend.
    """
    _require(name, device, dtype, 0.0)
    exact = case.compute("loop", torch.float64)
    for what, computed, wanted in zip(("output", "gradient"), case.compute(name, dtype), exact, strict=True):
        gap = _gap(computed, wanted)
        if not gap <= _TOLERANCE[dtype]:
            raise CheckFailed(f"{what} is {gap:.2g} off the loop in fp64, may be {_TOLERANCE[dtype]:g}")


def check_dropout(case: Case, name: str, dtype: torch.dtype, device: torch.device, draws: int) -> None:
    """Dropout: something is dropped; backward drops what forward dropped; the mean over draws is the output without it.

    For any fixed choice of what is dropped the output is linear in the values, so <gradient of V, V> = <grad, output>.

    Raises:
        CheckFailed: one of these does not hold.
        NotAvailable: the device cannot run this backend.
    """
    _require(name, device, dtype, _P)
    exact, _ = case.compute("loop", torch.float64)
    total, out = torch.zeros_like(exact), exact
    for _ in range(draws):
        out, gradient = case.compute(name, dtype, _P)
        total += out
        left = float((gradient[:, 2].double() * case.qkv[:, 2].double()).sum())
        right = float((case.grad.double() * out.double()).sum())
        # Rounding errs by a part of this, another draw by a third
        scale = float((case.grad.double() * out.double()).norm())
        if not abs(left - right) <= 2.5 * _TOLERANCE[dtype] * scale:
            raise CheckFailed(f"backward drops other weights than forward: {left:.6g} for {right:.6g}")
    one = _gap(out, exact)
    if one < 2 * _TOLERANCE[dtype]:
        raise CheckFailed("nothing is dropped")
    slope = float((total * exact).sum() / exact.square().sum()) / draws
    doubt = 5 * one / (draws * len(exact) * case.qkv.shape[2]) ** 0.5  # a head's values share what is dropped
    if not abs(slope - 1) <= doubt + _TOLERANCE[dtype]:
        raise CheckFailed(f"the mean of {draws} draws is {slope:.4f} times the output without dropout")


def _timed(context: Context, case: Case, name: str, dtype: torch.dtype, dropout: float, device: torch.device) -> None:
    _require(name, device, dtype, dropout)
    layout = case.layout()
    qkv = case.qkv.to(dtype, copy=True).requires_grad_()

    def once() -> None:
        out = find_backend(name)(qkv, layout, dropout)
        torch.autograd.grad(out, qkv, case.grad)

    once()
    reset_peak(context.device)
    before = peak_mib(context.device) or 0.0
    seconds = median_seconds(once, context.device, repeats=2 if context.tiny else 10, warm_up=1)
    metrics = context.result.metrics
    metrics[f"attention_ms/{name}/{dropout:g}"] = 1e3 * seconds
    peak = peak_mib(context.device)
    if peak is not None:
        metrics[f"attention_mib/{name}/{dropout:g}"] = peak - before
