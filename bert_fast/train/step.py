"""The order of one optimizer step. Nothing in it waits for the device on a GPU."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Protocol

import torch

from bert_fast.communication.engine import Engine
from bert_fast.model.bert import BertInput
from bert_fast.model.objective import Objective
from bert_fast.optim.bucketwise import BucketwiseOptimizer
from bert_fast.optim.build import RunOptimizer
from bert_fast.trace import Trace, span_or_nothing
from bert_fast.train.clock import DeviceTimer
from bert_fast.train.loss_scale import LossScale


@dataclass
class StepInput:
    """A rank's share of a step. Counts are those of the global batch: every rank knows them from the plan.

    `micro_batches` are those of all virtual ranks in order, as many for each.
    """

    micro_batches: list[BertInput]
    global_masked: int | torch.Tensor
    global_samples: int | torch.Tensor


@dataclass
class StepResult:
    """0-dim device tensors of this rank and host timings in seconds (on CUDA `read_device_times` has the device's).

    nsp_sum is None where the model does not predict next sentences.
    """

    mlm_sum: torch.Tensor
    nsp_sum: torch.Tensor | None
    grad_norm: torch.Tensor
    is_finite: torch.Tensor
    local_is_finite: torch.Tensor
    compute_s: float
    exposed_s: float
    optimizer_s: float


@dataclass(frozen=True)
class DeviceTimes:
    """Seconds on the device since the last reading: forward and backward step by step, exposed communication in all."""

    compute_s: list[float]
    exposed_s: float | None


def do_nothing() -> None:
    """Where nothing has to happen before an update."""


class Step(Protocol):
    """One optimizer step, run eagerly (`TrainStep`) or as a CUDA graph (`cuda_graphs.CudaGraphStep`)."""

    optimizer: RunOptimizer

    def __call__(self, inputs: StepInput, lr: float, before_update: Callable[[], None] = do_nothing) -> StepResult:
        """Run it with a learning rate. `before_update` is called before weights and moments change."""

    def set_trace(self, trace: Trace | None) -> None:
        """Record spans of what happens from now on, or stop recording."""

    def read_device_times(self) -> DeviceTimes | None:
        """What was timed on the device since the last reading, which must be past it; None: the host's times hold."""

    def prepare_rates(self) -> None:
        """After the optimizer's state was loaded: bring its learning rates into the form that this step needs."""


class TrainStep:
    """Forward, backward with overlapped reduction, finite check, update."""

    def __init__(
        self,
        engine: Engine,
        optimizer: RunOptimizer,
        objective: Objective,
        *,
        device: torch.device,
        dtype: torch.dtype,
        world_size: int,
        loss_scale: LossScale | None,
        parameters_by_bucket: Sequence[Sequence[torch.Tensor]] | None = None,
        use_device_timers: bool = True,
        ranks_per_node: int | None = None,
    ) -> None:
        """
        Args:
            engine: with its virtual ranks enabled, if there are any.
            dtype: autocast format; fp32: no autocast.
            parameters_by_bucket: what the optimizer updates of each bucket, to update each as soon as it is reduced
                (`optimizer.step_per_bucket`); None: all at the end. With it the call is a collective.
            ranks_per_node: for objectives whose ranks exchange more than gradients.
            use_device_timers: time a CUDA device by events; not inside a CUDA graph, whose events cannot be read.
        """
        self.engine, self.optimizer, self._objective = engine, optimizer, objective
        self._device, self._dtype = device, dtype
        self._num_ranks, self._loss_scale = world_size * engine.num_virtual_ranks, loss_scale
        self._bucketwise: BucketwiseOptimizer | None = None
        if parameters_by_bucket is not None:
            self._bucketwise = BucketwiseOptimizer(optimizer, parameters_by_bucket)
            engine.enable_nonfinite_flag()
        self._trace: Trace | None = None
        self._ranks_per_node = ranks_per_node
        timed = use_device_timers and device.type == "cuda"
        self._compute_timer = DeviceTimer() if timed else None
        self._exposed_timer = DeviceTimer() if timed else None  # from backward's end to the averaged gradient
        self._waits_for_flag = device.type == "cpu" or not optimizer.reads_found_inf

    def set_trace(self, trace: Trace | None) -> None:
        self._trace = trace
        self.engine.set_trace(trace)

    def prepare_rates(self) -> None:
        pass  # plain numbers will do

    def read_device_times(self) -> DeviceTimes | None:
        if self._compute_timer is None or self._exposed_timer is None:
            return None
        return DeviceTimes(self._compute_timer.read(), sum(self._exposed_timer.read()))

    def __call__(
        self, inputs: StepInput, lr: float | None, before_update: Callable[[], None] = do_nothing
    ) -> StepResult:
        """One step; a learning rate of None leaves the optimizer's as it is."""
        start = time.perf_counter()
        if lr is not None:  # before backward, in which a wire format may read it
            self._set_rate(lr)
        self.engine.zero_grad()
        with self._compute_timer or nullcontext():
            mlm_sum, nsp_sum = self._forward_backward(inputs)
        backward_end = time.perf_counter()
        before_update()
        if self._bucketwise is None:
            with self._exposed_timer or nullcontext():
                norm = self.engine.finish()
            is_finite = torch.isfinite(norm)
            with span_or_nothing(self._trace, "optimizer", "all"):
                self._update((~is_finite).to(torch.float32), self.optimizer.step)
        else:
            norm, is_finite = self._finish_by_bucket(self._bucketwise)
        self.engine.wire.end_step(~is_finite)
        self.engine.gather_weights()
        waited_s, exposed_s = self.engine.weight_wait_s, self.engine.exposed_s
        return StepResult(
            mlm_sum,
            nsp_sum,
            norm,
            is_finite,
            local_is_finite=torch.isfinite(mlm_sum if nsp_sum is None else mlm_sum + nsp_sum),
            compute_s=backward_end - start - waited_s,
            exposed_s=exposed_s + waited_s,
            optimizer_s=time.perf_counter() - backward_end - exposed_s,
        )

    def _finish_by_bucket(self, bucketwise: BucketwiseOptimizer) -> tuple[torch.Tensor, torch.Tensor]:
        """Reduce and update bucket by bucket: norm, and whether the gradient was finite (else nothing was updated)."""
        flags: list[torch.Tensor] = []

        def update(number: int, found_inf: torch.Tensor) -> None:
            flags.append(found_inf)
            with span_or_nothing(self._trace, "optimizer", f"bucket {number}"):
                self._update(found_inf, lambda: bucketwise.step(number), once=number == 0)

        with self._exposed_timer or nullcontext():  # with the updates in between
            norm = self.engine.finish(update)
        return norm, torch.isfinite(norm) & (flags[0] == 0)

    def _forward_backward(self, inputs: StepInput) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Gradients of num_ranks * (rank's share of the global mean loss): their average is the global gradient.

        Virtual ranks count as ranks.
        """
        per_rank = len(inputs.micro_batches) // self.engine.num_virtual_ranks
        scale = self._loss_scale.value if self._loss_scale else None
        sums = []
        for index, batch in enumerate(inputs.micro_batches):
            last = index == len(inputs.micro_batches) - 1
            with self.engine.micro_batch(last, scale):
                # Without autocast's cache: a weight is cast once in a forward pass anyway, and the cache would hold all casts
                # until its end, those of layers that are computed again as well
                autocast = torch.autocast(
                    self._device.type, self._dtype, enabled=self._dtype != torch.float32, cache_enabled=False
                )
                with autocast, span_or_nothing(self._trace, "compute", f"forward {index}"):
                    losses = self.engine.module(batch)
                loss = self._num_ranks * self._objective.loss(losses, inputs.global_masked, inputs.global_samples)
                with span_or_nothing(self._trace, "compute", f"backward {index}"):
                    (loss if scale is None else loss * scale).backward()
            if not last and (index + 1) % per_rank == 0:
                self.engine.end_virtual_rank()
            sums.append((losses.mlm_sum.detach(), None if losses.nsp_sum is None else losses.nsp_sum.detach()))
        if len(sums) == 1:
            return sums[0]
        nsp_sums = [nsp for _, nsp in sums if nsp is not None]
        return torch.stack([mlm for mlm, _ in sums]).sum(), torch.stack(nsp_sums).sum() if nsp_sums else None

    def _set_rate(self, lr: float) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = lr * group.get("lr_scale", 1.0)

    def _update(self, found_inf: torch.Tensor, step: Callable[[], object], once: bool = True) -> None:
        """Apply the gradient, or leave everything as it is where it is not finite."""
        if self._loss_scale and once:
            self._loss_scale.update(found_inf)
        if self._waits_for_flag:
            if not bool(found_inf):
                step()
            return
        self.optimizer.grad_scale = None  # type: ignore[attr-defined]
        self.optimizer.found_inf = found_inf  # type: ignore[attr-defined]
        step()
