"""Runs the stages of a model by a plan of rematerialization (`memory.remat`), on torch's checkpointing.

What is computed again draws the same random numbers: checkpointing puts torch's generators back, and seeds of our fused dropout
come from those. Losses and gradients are therefore those of a run that keeps everything, bit for bit.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any, Protocol

import torch
from torch.utils.checkpoint import checkpoint

from bert_fast.errors import UserError
from bert_fast.memory.remat import Segment


class ModelStage(Protocol):
    """A part of a model from one tensor to the next."""

    @property
    def name(self) -> str: ...

    @property
    def run(self) -> Callable[[torch.Tensor], torch.Tensor]: ...


def _run(stages: Sequence[ModelStage], hidden: torch.Tensor) -> torch.Tensor:
    for stage in stages:
        hidden = stage.run(hidden)
    return hidden


class SegmentRunner:
    """Calls stages by the segments of a plan. Without gradients (evaluation) they are called one after the other.

    Args:
        segments: of a chain that begins with the stages that are called; later segments (heads, losses) are run by the caller.
        restore_random: put torch's random generators back before a segment is computed again; False where the stages draw
            none, as inside a CUDA graph, which cannot read the state of a generator.
        on_host: keep what autograd saves in pinned memory of the host, and bring it back in backward.
        to_the_end: compute all of a segment again, its last operations too, which nothing needs but hooks that wait for them.
    """

    def __init__(
        self,
        segments: Sequence[Segment],
        *,
        restore_random: bool = True,
        on_host: bool = False,
        to_the_end: bool = False,
    ) -> None:
        self.segments = tuple(segments)
        self._on_host = on_host
        self._how = {"restore_random": restore_random, "to_the_end": to_the_end}

    def __call__(self, stages: Sequence[ModelStage], first: torch.Tensor) -> torch.Tensor:
        """
        Raises:
            ValueError: a segment goes beyond the last stage.
        """
        own = [segment for segment in self.segments if segment.begin < len(stages)]
        if not own or own[-1].end != len(stages):
            raise ValueError(f"no segment ends with the last of {len(stages)} stages, {stages[-1].name}")
        if not torch.is_grad_enabled():
            return _run(stages, first)
        with SavedOnHost(pin_memory=first.is_cuda) if self._on_host else nullcontext():
            return self._run_segments(own, stages, first)

    def _run_segments(
        self, segments: Sequence[Segment], stages: Sequence[ModelStage], hidden: torch.Tensor
    ) -> torch.Tensor:
        for segment in segments:
            inside = stages[segment.begin : segment.end]
            if segment.recompute:
                hidden = again_in_backward(_run, inside, hidden, **self._how)
            else:
                hidden = _run(inside, hidden)
        return hidden


class SavedOnHost(torch.autograd.graph.saved_tensors_hooks):
    """As torch's save_on_cpu, but for parameters, which are on the device anyway."""

    def __init__(self, *, pin_memory: bool) -> None:
        def pack(tensor: torch.Tensor) -> Any:
            if isinstance(tensor, torch.nn.Parameter):
                return tensor
            try:
                kept = torch.empty_like(tensor, device="cpu", pin_memory=pin_memory)
            except RuntimeError as error:
                raise UserError(
                    f"memory.offload_activations=true: the host has no pinned memory for them "
                    f"({str(error).splitlines()[0][:100]}); raise the limit of locked memory (ulimit -l), or set "
                    "memory.recompute=optimal instead"
                ) from None
            return tensor.device, kept.copy_(tensor, non_blocking=pin_memory)

        def unpack(packed: Any) -> torch.Tensor:
            if isinstance(packed, torch.Tensor):
                return packed
            device, kept = packed
            back: torch.Tensor = kept.to(device, non_blocking=pin_memory) if pin_memory else kept.clone()
            return back

        super().__init__(pack, unpack)


def again_in_backward(
    function: Callable[..., torch.Tensor], *args: Any, restore_random: bool = True, to_the_end: bool = False
) -> torch.Tensor:
    """`function(*args)`, of which backward keeps the arguments alone and computes the rest again."""
    # `determinism_check` compares shapes of what is saved: cheap, and it notices a function that is not the same twice
    result: torch.Tensor = checkpoint(
        function, *args, use_reentrant=False, preserve_rng_state=restore_random, early_stop=not to_the_end
    )
    return result


class RecomputedAttention:
    """An attention function whose scores and probabilities are computed again in backward: only its operands are kept.

    Source: Korthikanti et al., arXiv 2205.05198 ("selective" recomputation).
    """

    def __init__(self, attend: Callable[..., torch.Tensor], *, restore_random: bool = True) -> None:
        self._attend, self._restore_random = attend, restore_random

    def __call__(self, qkv: torch.Tensor, *args: Any) -> torch.Tensor:
        if not torch.is_grad_enabled():
            return self._attend(qkv, *args)
        return again_in_backward(self._attend, qkv, *args, restore_random=self._restore_random)
