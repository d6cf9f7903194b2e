"""From a model's stages to the chain that plans of rematerialization are made for: each stage is run once by itself."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

import torch

from bert_fast.memory.meter import meter
from bert_fast.memory.remat import Chain, Stage
from bert_fast.memory.segments import ModelStage

_TIMED = 3  # runs of a stage of which the median counts


def measure_chain(
    stages: Sequence[ModelStage],
    first: torch.Tensor,
    last: Callable[[torch.Tensor], torch.Tensor],
    last_name: str = "heads",
    *,
    grads_resident: bool = True,
    timed: bool = True,
) -> Chain:
    """The chain of a model, by running each stage forward and backward by itself.

    Weights and their gradients are as they were afterwards (a gradient that was there may have been added to).

    Args:
        first: what the first stage takes; nothing flows back to it if it is of integers.
        last: from the last stage's output to a 0-dim loss: the chain's last stage.
        grads_resident: whether the gradients of weights stay from step to step. Else a stage's are counted as growth.
        timed: measure seconds as well; not for fake tensors, which have none.
    """
    functions = [*((stage.name, stage.run) for stage in stages), (last_name, last)]
    hidden, measured, weights = first, [], []
    for name, function in functions:
        if hidden.is_floating_point():
            hidden = hidden.detach().requires_grad_()
        weights.append(
            _weights_of(function(hidden))
        )  # what is made at first use (tables of indices) is no part of a step
        seconds = _seconds(function, hidden) if timed else 0.0
        with _gradients_of(weights[-1]):
            stage = _sizes(name, function, hidden)
        measured.append(replace(stage, forward_s=seconds))
        with torch.no_grad():  # only now, as it would be memory beside what is measured
            hidden = function(hidden)
    waiting, first_use = _waiting(weights), set()
    for number, stage in reversed(list(enumerate(measured))):
        new = [weight for weight in weights[number] if weight not in first_use]
        first_use.update(new)
        measured[number] = replace(
            stage,
            temporary_bytes=stage.temporary_bytes + waiting[number],
            gradient_bytes=0 if grads_resident else sum(map(_bytes_of, new)),
        )
    return Chain(tuple(measured))


def _waiting(weights: list[list[torch.Tensor]]) -> list[int]:
    """Bytes, during each stage's backward, of gradients of weights that an earlier stage has a part in.

    Autograd adds up all parts of a weight's gradient before it adds their sum to `grad`: that of a table which both ends of a
    model use waits for all of backward.
    """
    uses: dict[torch.Tensor, list[int]] = {}
    for number, own in enumerate(weights):
        for weight in own:
            uses.setdefault(weight, []).append(number)
    waiting = [0] * len(weights)
    for weight, numbers in uses.items():
        for number in range(numbers[0], numbers[-1]):
            waiting[number] += _bytes_of(weight)
    return waiting


def _bytes_of(tensor: torch.Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _weights_of(output: torch.Tensor) -> list[torch.Tensor]:
    """The leaves of a graph that collect gradients, without what the stage was given."""
    found: list[torch.Tensor] = []
    seen, waiting = set(), [output.grad_fn]
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        leaf = getattr(node, "variable", None)
        if leaf is not None and isinstance(leaf, torch.nn.Parameter):
            found.append(leaf)
        waiting += [following for following, _ in node.next_functions]
    return found


@contextmanager
def _gradients_of(weights: list[torch.Tensor]) -> Iterator[None]:
    """Inside, every weight has a gradient to add to; afterwards those that had none have none."""
    without = [weight for weight in weights if weight.grad is None]
    for weight in without:
        weight.grad = torch.zeros_like(weight)
    try:
        yield
    finally:
        for weight in without:
            weight.grad = None


def _seconds(function: Callable[[torch.Tensor], torch.Tensor], hidden: torch.Tensor) -> float:
    times = []
    for _ in range(_TIMED):
        _wait(hidden.device)
        start = time.perf_counter()
        function(hidden)
        _wait(hidden.device)
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _sizes(name: str, function: Callable[[torch.Tensor], torch.Tensor], hidden: torch.Tensor) -> Stage:
    def both_ways() -> None:
        output = function(hidden)
        torch.autograd.backward(output, torch.ones_like(output))

    at_first_use: list[int] = []  # bytes that are live when backward asks for something that is saved

    def unpack(tensor: torch.Tensor) -> torch.Tensor:
        at_first_use.append(count.live)
        return tensor

    with meter(hidden.device, both_ways) as count:
        with torch.autograd.graph.saved_tensors_hooks(torch.Tensor.detach, unpack):
            output = function(hidden)
        size = output.untyped_storage().nbytes()
        saved, forward_peak = max(0, count.live - size), count.peak
        # A product whose gradient autograd makes and lets go of, as it does with that of a following stage
        edge, one = torch.autograd.graph.get_gradient_edge(output * 1.0), output.new_ones(()).expand_as(output)
        del output
        count.reset_peak()
        before = count.live
        torch.autograd.backward(edge, one)
        backward_peak = count.peak
    hidden.grad = None
    # Computed again, the forward pass has the gradient of the output beside it, which may be in a wider format by then
    gradient = max(size, at_first_use[0] - before) if at_first_use else size
    temporary = max(forward_peak + gradient - size, backward_peak - size) - saved
    return Stage(name, size, saved, temporary_bytes=max(0, temporary))
