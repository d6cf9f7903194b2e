"""Optimizers that precondition with the last m gradients: M-FAC and GGT, whole or compressed (EFCP), and MicroAdam.

    a = residual + g;  c = C(a);  residual = a - c;  window <- c;  u = rule(window);  w <- w - lr u

(EFCP, arXiv 2306.06098, algorithms 1 and 2; MicroAdam, arXiv 2405.15593, algorithm 1). The gradient is compressed before
the preconditioner sees it, and what is preconditioned is the newest row c itself. So every rule gives m coefficients, from the
m x m Gram matrix of the window alone, and u is the rows times them: no m x d product, no LU, and no difference of two numbers
that were divided by a small damping.

Weight decay is decoupled and times the learning rate. The published code of EFCP leaves the rate out, so that its values of the
weight decay are not ours.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from typing import Any, ClassVar

import torch
from torch import nn

from bert_fast.compression.error_feedback import ErrorFeedback
from bert_fast.compression.lowrank import PowerIteration, has_smaller_factors
from bert_fast.compression.ring import DenseWindow, LowRankWindow, SparseWindow, Window
from bert_fast.compression.topk import TopK
from bert_fast.config import OptimizerConfig
from bert_fast.config.choices import OPTIMIZERS, WindowOfGradients
from bert_fast.optim.build import RunOptimizer, has_decay, layer_of

# ---- rules: coefficients of the rows ----------------------------------------------------------------------------------------


def mfac(window: Window, damping: float) -> torch.Tensor:
    """fp64 [m]: of F^-1 c with F = damping I + (1/m) sum of g g^T over the window, and c its newest row.

    F^-1 G^T e = m G^T (m damping I + G G^T)^-1 e (push-through identity). The divisor stays m while the window fills.
    """
    unit = torch.zeros_like(window.gram[0])
    unit[window.newest] = 1.0
    damped = window.gram.clone()
    damped.diagonal().add_(window.m * damping)
    solved = torch.cholesky_solve(unit[:, None], torch.linalg.cholesky(damped))[:, 0]
    return window.m * solved


def ggt(window: Window, beta2: float, eps: float) -> torch.Tensor:
    """fp64 [m]: of U (S + eps)^-1 U^T c, with U S V^T the window whose rows decay by beta2 with their age, and c its newest.

    (GGT, arXiv 1806.02958, section 2.) c lies in the span of the rows, so that the part outside of it, divided by eps, is zero.
    """
    age = window.ages()
    decay = beta2 ** age.to(torch.float64)
    squares, vectors = torch.linalg.eigh(window.gram * decay[:, None] * decay[None, :])
    lengths = squares.clamp_min(0).sqrt()
    of_newest = vectors[window.newest]
    return decay * (vectors @ (of_newest / (lengths + eps)))


# ---- compression: what is pushed into which window --------------------------------------------------------------------------


class _Compressor(ABC):
    """Turns a flat gradient [numel] into the newest row of its window, and keeps what the row leaves out."""

    window: Window
    feedback: ErrorFeedback | None = None

    def push(self, gradient: torch.Tensor) -> None:
        """Add the residual, compress, push; `gradient` is changed."""
        corrected = gradient if self.feedback is None else self.feedback.correct(gradient)
        row = self._push(corrected)
        if self.feedback is not None:
            self.feedback.keep(corrected, row)

    @property
    def num_bytes(self) -> int:
        """Bytes that it keeps, without the residual."""
        return self.window.num_bytes

    @abstractmethod
    def _push(self, values: torch.Tensor) -> torch.Tensor:
        """Push what is kept of `values`, and return that, fp32 [numel]."""

    def clear(self) -> None:
        """Be as if nothing was pushed."""
        self.window.clear()
        if self.feedback is not None:
            self.feedback.clear()

    def state_dict(self) -> dict[str, Any]:
        feedback = {} if self.feedback is None else {"feedback": self.feedback.state_dict()}
        return {"window": self.window.state_dict(), **feedback}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if ("feedback" in state) != (self.feedback is not None):
            raise ValueError("state with and without error feedback")
        self.window.load_state_dict(state["window"])
        if self.feedback is not None:
            self.feedback.load_state_dict(state["feedback"])


class _Whole(_Compressor):
    """No compression: the oracle, and what the memory of the others is compared with."""

    def __init__(self, m: int, numel: int, device: torch.device) -> None:
        self.window: DenseWindow = DenseWindow(m, numel, device)

    def _push(self, values: torch.Tensor) -> torch.Tensor:
        self.window.push(values)
        return values


class _Sparse(_Compressor):
    """Block Top-K."""

    def __init__(
        self,
        m: int,
        numel: int,
        top_k: TopK,
        feedback: ErrorFeedback | None,
        device: torch.device,
        uses_products: bool,
    ) -> None:
        self.window: SparseWindow = SparseWindow(m, numel, top_k, device, keeps_products=uses_products)
        self._top_k, self.feedback = top_k, feedback

    def push(self, gradient: torch.Tensor) -> None:
        if self.feedback is None or not self.window.push_largest(gradient, self.feedback):
            super().push(gradient)

    def _push(self, values: torch.Tensor) -> torch.Tensor:
        places, selected = self._top_k.select(values[None])
        return self.window.push(places[0], selected[0])


class _LowRank(_Compressor):
    """A power iteration for every matrix that it makes smaller; the rest is whole."""

    def __init__(
        self,
        m: int,
        shapes: list[tuple[int, int]],
        whole: int,
        rank: int,
        feedback: ErrorFeedback | None,
        device: torch.device,
    ) -> None:
        self.window: LowRankWindow = LowRankWindow(m, shapes, rank, whole, device)
        self._iteration = PowerIteration(shapes, rank, device=device)
        self.feedback = feedback

    @property
    def num_bytes(self) -> int:
        return self.window.num_bytes + 4 * self._iteration.num_right

    def clear(self) -> None:
        super().clear()
        self._iteration.start_anew()

    def _push(self, values: torch.Tensor) -> torch.Tensor:
        *matrices, whole = self.window.split(values)
        left, right = self._iteration.right(matrices, self._iteration.left(matrices))
        self._iteration.start_from(right)
        factors = self._iteration.factors(left, right)
        self.window.push(factors, whole)
        return torch.cat([*((p @ q.mT).view(-1) for p, q in factors), whole])

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "iteration": self._iteration.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self._iteration.load_state_dict(state["iteration"])


# ---- the optimizers ---------------------------------------------------------------------------------------------------------


class Preconditioned(RunOptimizer):
    """Weights minus lr times what a rule makes of a window of gradients, a window for each parameter group.

    Where parameters are pieces of tensors, each rank has a part of every row, and scalar products are added up over ranks: one
    all-reduce of m numbers for each group and step.
    """

    has_opaque_state: ClassVar[bool] = True

    def __init__(
        self,
        groups: list[dict[str, Any]],
        compressors: list[_Compressor],
        update_of: Callable[[Window], torch.Tensor],
        *,
        num_rows: int,
        group_of: Callable[[str], str],
        lr: float,
        momentum: float = 0.0,
        uses_products: bool = True,
    ) -> None:
        """
        Args:
            groups: with `name`, `params`, in the order of the window's numbers, and `decays`: weight decay of each. A rank
                that has no piece of the model has one group without parameters, and no compressor.
            num_rows: of each window.
            group_of: the name of a parameter's group, of the parameter's name.
            compressors: of each group.
            update_of: fp32 [numel] of a window after its newest row was pushed.
            uses_products: whether the rule needs the rows' scalar products.
            momentum: decay of the moving average of updates that is subtracted in place of the update; 0: none.
        """
        super().__init__(groups, {"lr": lr, "momentum": momentum})
        self._compressors, self._update_of, self._group_of = compressors, update_of, group_of
        self._num_rows, self._uses_products = num_rows, uses_products
        self._averages = [
            torch.zeros(compressor.window.numel, device=group["params"][0].device) if momentum else None
            for compressor, group in zip(compressors, self._held_groups(), strict=True)
        ]

    def _held_groups(self) -> list[dict[str, Any]]:
        return [group for group in self.param_groups if group["params"]]

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """One update; a parameter without a gradient counts as one with zeros."""
        assert closure is None
        groups = self._held_groups()
        for group, compressor in zip(groups, self._compressors, strict=True):
            gradients = [(torch.zeros_like(p) if p.grad is None else p.grad).reshape(-1) for p in group["params"]]
            compressor.push(torch.cat(gradients).to(torch.float32))
        if self.share_sums is not None and self._uses_products:
            self._share_products(self.share_sums)
        for group, compressor, average in zip(groups, self._compressors, self._averages, strict=True):
            parameters = group["params"]
            update = self._update_of(compressor.window)
            if average is not None:
                update = average.mul_(group["momentum"]).add_(update, alpha=1 - group["momentum"])
            lr = group["lr"]
            for parameter, decay, change in zip(
                parameters, group["decays"], update.split([p.numel() for p in parameters]), strict=True
            ):
                if decay:
                    parameter.mul_(1 - lr * decay)
                parameter.sub_(change.view_as(parameter), alpha=lr)

    def _share_products(self, share_sums: Callable[..., dict[str, torch.Tensor]]) -> None:
        """Scalar products of whole rows, of which each rank has a part; then every rank computes the same coefficients."""
        windows = {
            group["name"]: each.window for group, each in zip(self._held_groups(), self._compressors, strict=True)
        }
        mine = {name: window.gram[window.newest].clone() for name, window in windows.items()}
        for name, products in share_sums(self._group_of, mine, self._num_rows).items():
            if name in windows:
                windows[name].replace_products(products)

    def state_bytes(self) -> int:
        """Bytes of all that is kept from step to step."""
        held = [t for t in self._averages if t is not None]
        feedback = [c.feedback.num_bytes for c in self._compressors if c.feedback is not None]
        return sum(c.num_bytes for c in self._compressors) + sum(feedback) + sum(4 * t.numel() for t in held)

    def clear_extra_state(self) -> None:
        for compressor in self._compressors:
            compressor.clear()
        for average in self._averages:
            if average is not None:
                average.zero_()

    def extra_state(self) -> dict[str, Any]:
        return {
            "windows": [compressor.state_dict() for compressor in self._compressors],
            "averages": [None if average is None else average.clone() for average in self._averages],
        }

    def load_extra_state(self, state: dict[str, Any]) -> None:
        for compressor, saved in zip(self._compressors, state["windows"], strict=True):
            compressor.load_state_dict(saved)
        for average, saved in zip(self._averages, state["averages"], strict=True):
            if (average is None) != (saved is None):
                raise ValueError("state with and without momentum")
            if average is not None:
                average.copy_(saved)


def micro_adam(window: SparseWindow, beta1: float, beta2: float, eps: float) -> torch.Tensor:
    """fp32 [numel]: Adam's update with both moments made anew of the window.

    Their bias is corrected by the weights that the window's rows have, so that the sum of them is 1. The published kernel
    divides by 1 - beta^t, of which a window of ten rows holds the smaller part the larger t is.
    """
    age = window.ages()
    held = age < window.count

    def weights(beta: float) -> torch.Tensor:
        powers = torch.where(held, beta ** age.to(torch.float64), 0.0)
        return powers / powers.sum()

    first, second = window.combine(weights(beta1)), window.combine_squares(weights(beta2))
    return first.div_(second.sqrt_().add_(eps))


def _group_of(config: OptimizerConfig) -> Callable[[str], str]:
    """The name of what has one window, of a parameter's name."""
    return (lambda _: "model") if config.precondition == "model" else layer_of


def _groups_of(
    named_parameters: Iterable[tuple[str, nn.Parameter]], config: OptimizerConfig
) -> tuple[list[dict[str, Any]], list[list[tuple[int, int]]]]:
    """Parameter groups, and the shapes of the matrices with which each begins; the rest of a group stays whole.

    A matrix is taken as such where its factors have fewer numbers than it has.
    """
    by_name: dict[str, list[tuple[str, nn.Parameter]]] = {}
    for name, parameter in named_parameters:
        by_name.setdefault(_group_of(config)(name), []).append((name, parameter))
    groups, shapes = [], []
    for name_of_group, members in by_name.items():
        matrices = [
            (n, p) for n, p in members if p.dim() == 2 and has_smaller_factors(p.shape[0], p.shape[1], config.rank)
        ]
        chosen = {name for name, _ in matrices}
        ordered = [*matrices, *((n, p) for n, p in members if n not in chosen)]
        decays = [config.weight_decay if has_decay(name) else 0.0 for name, _ in ordered]
        groups.append({"name": name_of_group, "params": [p for _, p in ordered], "decays": decays})
        shapes.append([(p.shape[0], p.shape[1]) for _, p in matrices])
    return groups, shapes


# ---- the entries of config.choices.OPTIMIZERS -------------------------------------------------------------------------------


def build_mfac(named_parameters: Iterable[tuple[str, nn.Parameter]], config: OptimizerConfig) -> RunOptimizer:
    """M-FAC over a window that is dense (the oracle), sparse (S-M-FAC) or of low rank (LR-M-FAC), as its entry says."""
    return _build(named_parameters, config, lambda window: window.combine(mfac(window, config.damping)))


def build_ggt(named_parameters: Iterable[tuple[str, nn.Parameter]], config: OptimizerConfig) -> RunOptimizer:
    """GGT, dense or sparse."""
    return _build(named_parameters, config, lambda window: window.combine(ggt(window, config.beta2, config.eps)))


def build_micro_adam(named_parameters: Iterable[tuple[str, nn.Parameter]], config: OptimizerConfig) -> RunOptimizer:
    """MicroAdam: Adam's moments over block Top-K with error feedback in 4 bits."""

    def update_of(window: Window) -> torch.Tensor:
        assert isinstance(window, SparseWindow)
        return micro_adam(window, config.beta1, config.beta2, config.eps)

    return _build(named_parameters, config, update_of, uses_products=False)


def _build(
    named_parameters: Iterable[tuple[str, nn.Parameter]],
    config: OptimizerConfig,
    update_of: Callable[[Window], torch.Tensor],
    uses_products: bool = True,
) -> RunOptimizer:
    kind = OPTIMIZERS[config.name].window
    assert kind is not None, config.name
    groups, shapes = _groups_of(named_parameters, config)
    compressors = [
        _compressor(
            kind, config, sum(p.numel() for p in group["params"]), matrices, group["params"][0].device, uses_products
        )
        for group, matrices in zip(groups, shapes, strict=True)
    ]
    momentum = config.momentum or 0.0
    return Preconditioned(
        groups or [{"name": "nothing", "params": [], "decays": []}], compressors, update_of,
        num_rows=config.window or kind.rows, group_of=_group_of(config), lr=config.lr, momentum=momentum,
        uses_products=uses_products,
    )  # fmt: skip


def _compressor(
    kind: WindowOfGradients,
    config: OptimizerConfig,
    numel: int,
    matrices: list[tuple[int, int]],
    device: torch.device,
    uses_products: bool,
) -> _Compressor:
    """What turns a group's gradient [numel], of which the first numbers are these matrices, into rows of its window."""
    m, feedback = config.window or kind.rows, None
    if config.error_feedback and kind.stored_as != "whole":
        storage = config.residual_dtype or kind.residual_dtype
        feedback = ErrorFeedback(numel, storage=storage, device=device, may_skip=False)
    if kind.stored_as == "sparse":
        return _Sparse(m, numel, TopK(config.density, config.numbers_per_block), feedback, device, uses_products)
    if kind.stored_as == "low_rank":
        whole = numel - sum(rows * columns for rows, columns in matrices)
        return _LowRank(m, matrices, whole, config.rank, feedback, device)
    return _Whole(m, numel, device)
