"""CUDA graphs of whole steps: forward, backward, collectives, update as one launch, for batches of fixed shapes.

A captured step reads its inputs from buffers that stay where they are. So every batch is copied into buffers of its shape:
token and mask counts come padded to few sizes (`batch.shape_multiple`, or rows of `balance.strategy: packed`), sequences are
filled up with empty ones to a fixed number, and what changes from step to step (learning rate, the counts that normalise the
loss) are 0-dim tensors. There is one graph per shape, captured at its first batch.

Sources: torch.cuda.CUDAGraph's notes; whole-iteration graphs as in NVIDIA's MLPerf submissions from v1.0 on.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch

from bert_fast.config import Config
from bert_fast.config.choices import ATTENTION_BACKENDS
from bert_fast.errors import UserError
from bert_fast.integers import round_up
from bert_fast.model.attention import SequenceLayout, find_backend
from bert_fast.model.bert import BertInput
from bert_fast.trace import Trace
from bert_fast.train.clock import DeviceTimer
from bert_fast.train.step import DeviceTimes, StepInput, StepResult, TrainStep, do_nothing

_WARM_UP = 3  # steps before a capture, as torch's notes have it


class Graph(Protocol):
    """The part of torch.cuda.CUDAGraph that is used."""

    def replay(self) -> None: ...


@dataclass
class _Captured:
    inputs: StepInput
    result: StepResult
    graph: Graph
    bytes_sent: int


def check_graphs(config: Config, device: torch.device, backend: str) -> None:
    """Refuse settings that cannot be captured. Raises UserError naming the one."""
    communication = config.communication
    able = [name for name in ATTENTION_BACKENDS if find_backend(name).reads_lengths_on_device]
    for bad, what in (
        (device.type != "cuda", f"a CUDA device, this run is on {device.type}"),
        (backend not in able, f"model.attention_backend={' or '.join(able)}, not {backend}"),
        (communication.engine != "bucketed", f"communication.engine=bucketed, not {communication.engine}"),
        (communication.shard_optimizer, "communication.shard_optimizer=false"),
        (config.optimizer.step_per_bucket, "optimizer.step_per_bucket=false"),
        (config.optimizer.use_apex, "optimizer.use_apex=false"),
        (config.run.profile, "run.profile=false: spans are of the host's time"),
    ):
        if bad:
            raise UserError(f"train.cuda_graphs needs {what}")


class CudaGraphStep:
    """Calls like TrainStep. The optimizer's learning rates must be tensors (`tensor_rates`).

    Times are of the device and of the whole step: inside a graph nothing can be told apart.
    """

    def __init__(
        self,
        step: TrainStep,
        max_seq_len: int,
        capture: Callable[[Callable[[], StepResult]], tuple[Graph, StepResult]],
        timer: DeviceTimer | None,
    ) -> None:
        """
        Args:
            step: what is captured; made with `use_device_timers=False`, as events cannot be read out of a graph.
            capture: records a call (`capture_on_cuda`).
            timer: of the device, around each replay.
        """
        self.optimizer = step.optimizer
        self._timer = timer
        self._step, self._max_seq_len, self._capture = step, max_seq_len, capture
        self._captured: dict[tuple[Any, ...], _Captured] = {}

    def set_trace(self, trace: Trace | None) -> None:
        """Spans are of the host, which does nothing inside a graph."""
        assert trace is None, "refused by check_graphs"

    def prepare_rates(self) -> None:
        tensor_rates(self.optimizer, next(iter(self.optimizer.param_groups[0]["params"])).device)

    def read_device_times(self) -> DeviceTimes | None:
        return None if self._timer is None else DeviceTimes(self._timer.read(), None)

    def __call__(self, inputs: StepInput, lr: float, before_update: Callable[[], None] = do_nothing) -> StepResult:
        before_update()
        inputs = static_form(inputs, self._max_seq_len)
        key = _shape_of(inputs)
        captured = self._captured.get(key)
        if captured is None:
            captured = self._captured[key] = self._first(inputs)
        copy_into(captured.inputs, inputs)
        for group in self.optimizer.param_groups:
            group["lr"].fill_(lr * group.get("lr_scale", 1.0))
        with self._timer or nullcontext():
            captured.graph.replay()
        self._step.engine.count_replay(captured.bytes_sent)
        return replace(captured.result, compute_s=0.0, exposed_s=0.0, optimizer_s=0.0)

    def _first(self, inputs: StepInput) -> _Captured:
        """Capture a step for a new shape. Weights, moments and random numbers end as they were."""
        buffers = _clone(inputs)
        engine = self._step.engine
        sent, calls = engine.counters()["gradient_bytes"], 0

        def step() -> StepResult:
            nonlocal calls
            calls += 1
            return self._step(buffers, None)

        with kept(self.optimizer):
            graph, result = self._capture(step)
        per_step = (engine.counters()["gradient_bytes"] - sent) // calls
        engine.reset_counters()  # forget the steps that only warmed up
        engine.wire.bytes_sent = sent
        return _Captured(buffers, result, graph, per_step)


def capture_on_cuda(step: Callable[[], StepResult]) -> tuple[Graph, StepResult]:
    """Warm up on a side stream, then capture."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(_WARM_UP):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = step()
    return graph, result


def tensor_rates(optimizer: torch.optim.Optimizer, device: torch.device) -> None:
    """Learning rates as 0-dim tensors, which a captured step reads at every replay."""
    for group in optimizer.param_groups:
        group["lr"] = torch.tensor(float(group["lr"]), device=device)
        if "capturable" in group:
            group["capturable"] = True


def static_form(inputs: StepInput, max_seq_len: int) -> StepInput:
    """A step's inputs with as many sequences for every batch of a shape: empty ones are added at the end.

    There is at most one sequence per token, and in practice one more than the samples; that is rounded up to a multiple of 64.
    """
    micro_batches = [_static_batch(batch, max_seq_len) for batch in inputs.micro_batches]
    device = micro_batches[0].input_ids.device

    def as_tensor(value: Any) -> torch.Tensor:
        return value if isinstance(value, torch.Tensor) else torch.tensor(float(value)).to(device, non_blocking=True)

    return StepInput(micro_batches, as_tensor(inputs.global_masked), as_tensor(inputs.global_samples))


def _static_batch(batch: BertInput, max_seq_len: int) -> BertInput:
    count = len(batch.layout.cu_seqlens) - 1
    room = round_up(count + 1, 64)
    end = batch.layout.cu_seqlens[-1:]
    cu_seqlens = torch.cat([batch.layout.cu_seqlens, end.expand(room - count)])
    labels = batch.next_sentence_labels
    labels = torch.cat([labels, labels.new_full((room - len(labels),), -1)])
    # `lengths` only says how wide the kernel's tiles must be
    return batch._replace(next_sentence_labels=labels, layout=SequenceLayout([max_seq_len], cu_seqlens))


def _tensors(inputs: StepInput) -> Iterator[torch.Tensor]:
    for batch in inputs.micro_batches:
        yield from batch[:-1]
        yield batch.layout.cu_seqlens
    yield from _counts(inputs)


def _counts(inputs: StepInput) -> tuple[torch.Tensor, torch.Tensor]:
    masked, samples = inputs.global_masked, inputs.global_samples
    assert isinstance(masked, torch.Tensor), "static_form has made it one"
    assert isinstance(samples, torch.Tensor)
    return masked, samples


def _shape_of(inputs: StepInput) -> tuple[Any, ...]:
    return tuple(tuple(tensor.shape) for tensor in _tensors(inputs))


def _clone(inputs: StepInput) -> StepInput:
    batches = [
        BertInput._make(
            [
                *(tensor.clone() for tensor in batch[:-1]),
                SequenceLayout(list(batch.layout.lengths), batch.layout.cu_seqlens.clone()),
            ]
        )
        for batch in inputs.micro_batches
    ]
    return StepInput(batches, *(count.clone() for count in _counts(inputs)))


def copy_into(buffers: StepInput, inputs: StepInput) -> None:
    """Fill a captured step's buffers."""
    for buffer, tensor in zip(_tensors(buffers), _tensors(inputs), strict=True):
        buffer.copy_(tensor, non_blocking=True)


@contextmanager
def kept(optimizer: torch.optim.Optimizer) -> Iterator[None]:
    """Inside, steps may run; afterwards weights and optimizer state are as before, in the same memory."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    weights = [p.detach().clone() for p in parameters]
    before = {p: {k: v.clone() for k, v in optimizer.state[p].items() if torch.is_tensor(v)} for p in parameters}
    random = torch.cuda.get_rng_state() if torch.cuda.is_available() else torch.get_rng_state()
    try:
        yield
    finally:
        with torch.no_grad():
            for parameter, weight in zip(parameters, weights, strict=True):
                parameter.copy_(weight)
                for name, value in optimizer.state[parameter].items():
                    if torch.is_tensor(value):
                        value.copy_(before[parameter][name]) if name in before[parameter] else value.zero_()
        (torch.cuda.set_rng_state if torch.cuda.is_available() else torch.set_rng_state)(random)
