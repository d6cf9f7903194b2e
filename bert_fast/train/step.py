"""The order of one optimizer step. Nothing in it waits for the device on a GPU."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import nn

from bert_fast.communication.clip import ClipStatistics
from bert_fast.communication.reducer import BucketReducer
from bert_fast.communication.sharded import ShardedReducer
from bert_fast.communication.wire_format import WireFormat
from bert_fast.model.bert import BertInput
from bert_fast.optim.bucketwise import BucketwiseOptimizer
from bert_fast.trace import Trace, span_or_nothing
from bert_fast.train.clock import DeviceTimer
from bert_fast.train.loss_scale import LossScale


class Engine(Protocol):
    """What `communication.reducer.BucketReducer` and `communication.ddp.DdpEngine` share."""

    module: nn.Module
    wire: WireFormat
    clip_statistics: ClipStatistics
    exposed_s: float
    trace: Trace | None

    def zero_grad(self) -> None: ...
    def micro_batch(self, last: bool, scale: torch.Tensor | None = None) -> Any: ...
    def finish(self) -> torch.Tensor: ...
    def wait_pending(self) -> None: ...


@dataclass
class StepInput:
    """A rank's share of a step. Counts are those of the global batch: every rank knows them from the plan."""

    micro_batches: list[BertInput]
    global_masked: int | torch.Tensor
    global_samples: int | torch.Tensor


@dataclass
class StepResult:
    """0-dim device tensors of this rank and host timings in seconds (on CUDA the timers have the device's)."""

    mlm_sum: torch.Tensor
    nsp_sum: torch.Tensor
    grad_norm: torch.Tensor
    is_finite: torch.Tensor
    local_is_finite: torch.Tensor
    compute_s: float
    exposed_s: float
    optimizer_s: float


class TrainStep:
    """Forward, backward with overlapped reduction, finite check, update."""

    def __init__(
        self, engine: Engine, optimizer: torch.optim.Optimizer, device: torch.device, dtype: torch.dtype,
        world_size: int, loss_scale: LossScale | None,
    ) -> None:  # fmt: skip
        self.engine = self._engine = engine
        self.optimizer, self._device, self._dtype = optimizer, device, dtype
        self._world, self._loss_scale = world_size, loss_scale
        self._parts: BucketwiseOptimizer | None = None
        self._trace: Trace | None = None
        self.compute_timer = DeviceTimer() if device.type == "cuda" else None
        self.exposed_timer = (
            DeviceTimer() if device.type == "cuda" else None
        )  # from backward's end to the averaged gradient
        self.before_update: Callable[[], None] = lambda: None  # called before weights and moments change
        self._needs_host_check = not isinstance(optimizer, torch.optim.AdamW) and not hasattr(
            type(optimizer), "found_inf"
        )

    def update_by_bucket(self, parts: Sequence[Sequence[torch.Tensor]]) -> None:
        """Update a bucket's weights as soon as it is reduced (config `optimizer.step_per_bucket`). A collective.

        Args:
            parts: the parameters, or pieces of them, that lie in each bucket.
        """
        assert isinstance(self._engine, BucketReducer), "checked by the config"
        self._parts = BucketwiseOptimizer(self.optimizer, parts)
        self._engine.enable_nonfinite_flag()

    def set_trace(self, trace: Trace | None) -> None:
        """Keep spans of what happens from now on, or no longer."""
        self._trace = self._engine.trace = trace

    def __call__(self, inputs: StepInput, lr: float | None) -> StepResult:
        """One step; a learning rate of None leaves the optimizer's as it is."""
        start = time.perf_counter()
        self._engine.zero_grad()
        with self.compute_timer or nullcontext():
            mlm_sum, nsp_sum = self._forward_backward(inputs)
        backward_end = time.perf_counter()
        self.before_update()
        if lr is not None:
            self._set_rate(lr)
        if self._parts is None:
            with self.exposed_timer or nullcontext():
                norm = self._engine.finish()
            is_finite = torch.isfinite(norm)
            with span_or_nothing(self._trace, "optimizer", "all"):
                self._update((~is_finite).to(torch.float32), self.optimizer.step)
        else:
            norm, is_finite = self._finish_by_bucket(self._parts)
        waited_s = 0.0  # in forward, for weights of the step before
        if isinstance(self._engine, ShardedReducer):
            self._engine.gather_weights()
            waited_s = self._engine.weight_wait_s
        exposed_s = self._engine.exposed_s
        return StepResult(
            mlm_sum, nsp_sum, norm, is_finite, torch.isfinite(mlm_sum + nsp_sum), backward_end - start - waited_s,
            exposed_s + waited_s, time.perf_counter() - backward_end - exposed_s,
        )  # fmt: skip

    def _finish_by_bucket(self, parts: BucketwiseOptimizer) -> tuple[torch.Tensor, torch.Tensor]:
        """Reduce and update bucket by bucket: norm, and whether the gradient was finite (else nothing was updated)."""
        flags: list[torch.Tensor] = []

        def update(number: int, found_inf: torch.Tensor) -> None:
            flags.append(found_inf)
            with span_or_nothing(self._trace, "optimizer", f"bucket {number}"):
                self._update(found_inf, lambda: parts.step(number), once=number == 0)

        with self.exposed_timer or nullcontext():  # with the updates in between
            norm = self._engine.finish(update)  # type: ignore[call-arg]
        return norm, torch.isfinite(norm) & (flags[0] == 0)

    def _forward_backward(self, inputs: StepInput) -> tuple[torch.Tensor, torch.Tensor]:
        """Gradients of world_size * (rank's share of the global mean loss): their average is the global gradient."""
        scale = self._loss_scale.value if self._loss_scale else None
        sums = []
        for index, batch in enumerate(inputs.micro_batches):
            last = index == len(inputs.micro_batches) - 1
            with self._engine.micro_batch(last, scale):
                autocast = torch.autocast(self._device.type, self._dtype, enabled=self._dtype != torch.float32)
                with autocast, span_or_nothing(self._trace, "compute", f"forward {index}"):
                    losses = self._engine.module(batch)
                loss = self._world * (losses.mlm_sum / inputs.global_masked + losses.nsp_sum / inputs.global_samples)
                with span_or_nothing(self._trace, "compute", f"backward {index}"):
                    (loss if scale is None else loss * scale).backward()
            sums.append((losses.mlm_sum.detach(), losses.nsp_sum.detach()))
        if len(sums) == 1:
            return sums[0]
        return torch.stack([a for a, _ in sums]).sum(), torch.stack([b for _, b in sums]).sum()

    def _set_rate(self, lr: float) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = lr

    def _update(self, found_inf: torch.Tensor, step: Callable[[], object], once: bool = True) -> None:
        """Apply the gradient, or leave everything as it is where it is not finite."""
        if self._loss_scale and once:
            self._loss_scale.update(found_inf)
        if self._needs_host_check or self._device.type == "cpu":
            if not bool(found_inf):
                step()
            return
        self.optimizer.grad_scale = None  # type: ignore[attr-defined]
        self.optimizer.found_inf = found_inf  # type: ignore[attr-defined]
        step()
