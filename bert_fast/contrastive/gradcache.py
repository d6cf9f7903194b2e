"""An encoder's gradients from a loss over all of a batch, with the activations of one micro-batch at a time.

Embeddings of all micro-batches are computed without a graph; the loss gives the gradients by the embeddings; and each
micro-batch is computed again, with a graph and the same random numbers, to take its gradients on. So activations do not grow
with the batch; forward runs twice. Source: Gao et al., arXiv 2101.06983.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import TypeVar

import torch

MicroBatch = TypeVar("MicroBatch")


def cached_backward(
    encode: Callable[[MicroBatch], torch.Tensor],
    micro_batches: Sequence[MicroBatch],
    loss: Callable[[list[torch.Tensor], list[torch.Tensor]], torch.Tensor],
    device: torch.device,
    around: Callable[[int], AbstractContextManager[object]] = lambda _number: nullcontext(),
    scale: torch.Tensor | None = None,
    parameters: Sequence[torch.Tensor] = (),
) -> torch.Tensor:
    """Add the gradients of the loss to those of the encoder and of `parameters`.

    Gradients are those of one pass over everything, to rounding, dropout included. A single micro-batch is computed once.

    Args:
        encode: a micro-batch's embeddings [n, d].
        loss: 0-dim, from the embeddings of each micro-batch in order, and from `parameters`. Runs once.
        device: of the encoder, whose random numbers are repeated.
        around: entered for the pass of a micro-batch that has a gradient, by its number: where communication is held back until
            the last one (DistributedDataParallel's `no_sync`).
        scale: what the loss is multiplied by before backward (fp16).
        parameters: of the loss itself, such as its temperature; their gradients come with those of the last micro-batch.

    Returns:
        The loss, 0-dim, detached and without the scale.
    """
    if not micro_batches:
        raise ValueError("no micro-batch")

    def from_loss(embeddings: list[torch.Tensor], used: list[torch.Tensor]) -> torch.Tensor:
        value = loss(embeddings, used)
        (value if scale is None else value * scale).backward()
        return value.detach()

    if len(micro_batches) == 1:
        with around(0):
            return from_loss([encode(micro_batches[0])], list(parameters))
    before, embeddings = [], []
    with torch.no_grad():
        for micro_batch in micro_batches:
            before.append(RandomState(device))
            embeddings.append(encode(micro_batch))
    leaves = [each.detach().requires_grad_() for each in embeddings]
    copies = [each.detach().clone().requires_grad_() for each in parameters]
    value = from_loss(leaves, copies)
    after = RandomState(device)
    for number, micro_batch in enumerate(micro_batches):
        before[number].restore()
        with around(number):
            outputs, gradients = [encode(micro_batch)], [leaves[number].grad]
            if number == len(micro_batches) - 1:
                outputs += parameters
                gradients += [copy.grad for copy in copies]
            torch.autograd.backward(
                outputs, [torch.zeros_like(x) if g is None else g for x, g in zip(outputs, gradients, strict=True)]
            )
        leaves[number].grad = None
    after.restore()
    return value


class RandomState:
    """Where torch's random numbers are, on the CPU and on a device."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._on_cpu = torch.get_rng_state()
        self._on_device = torch.cuda.get_rng_state(device) if device.type == "cuda" else None

    def restore(self) -> None:
        """Go back to it."""
        torch.set_rng_state(self._on_cpu)
        if self._on_device is not None:
            torch.cuda.set_rng_state(self._on_device, self._device)
