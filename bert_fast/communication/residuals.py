"""What a rank has not sent of its buckets: a residual for each, and how it passes to other buckets and other ranks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from bert_fast.communication.buckets import GradientLayout
from bert_fast.compression.error_feedback import ErrorFeedback


class Residuals:
    """A residual of every bucket, or of one of the equal parts of every bucket."""

    def __init__(
        self,
        layout: GradientLayout,
        storage: str,
        device: torch.device,
        *,
        part: int = 0,
        num_parts: int = 1,
    ) -> None:
        self._layout, self._storage, self._device = layout, storage, device
        lengths = [(bucket.end - bucket.start) // num_parts for bucket in layout.buckets]
        self._begins = [bucket.start + part * n for bucket, n in zip(layout.buckets, lengths, strict=True)]
        self._held = [ErrorFeedback(n, storage=storage, device=device) for n in lengths]

    def __getitem__(self, number: int) -> ErrorFeedback:
        return self._held[number]

    def end_step(self, skipped: torch.Tensor | bool) -> None:
        """See `ErrorFeedback.end_step`."""
        for feedback in self._held:
            feedback.end_step(skipped)

    def state_dict(self) -> dict[str, Any]:
        """The residuals, as copies, and where they lie."""
        return {
            "held": [feedback.state_dict() for feedback in self._held],
            "begins": list(self._begins),
            "offsets": list(self._layout.offsets),
        }

    def fits(self, state: dict[str, Any]) -> bool:
        """Whether a state is of the same buckets, and can be loaded bit for bit."""
        sizes = [each["numel"] for each in state["held"]]
        same_places = state["begins"] == self._begins and state["offsets"] == list(self._layout.offsets)
        return same_places and sizes == [feedback.numel for feedback in self._held]

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up a state that fits."""
        for feedback, each in zip(self._held, state["held"], strict=True):
            feedback.load_state_dict(each)

    def take_over(self, states: Sequence[dict[str, Any]]) -> None:
        """Begin with the sum of what other residuals held for the elements that these are of, whatever their buckets were."""
        layout = self._layout
        total = torch.zeros(layout.size, device=self._device)
        for state in states:
            old = self._whole(state)
            for numel, here, there in zip(layout.numel, layout.offsets, state["offsets"], strict=True):
                total[here : here + numel] += old[there : there + numel]
        for begin, feedback in zip(self._begins, self._held, strict=True):
            feedback.set_residual(total[begin : begin + feedback.numel])

    def _whole(self, state: dict[str, Any]) -> torch.Tensor:
        """fp32, in the places of the old layout, with zeros where a part of the buckets was held."""
        size = max(there + n for there, n in zip(state["offsets"], self._layout.numel, strict=True))
        ends = [begin + each["numel"] for begin, each in zip(state["begins"], state["held"], strict=True)]
        whole = torch.zeros(max(size, *ends), device=self._device)
        for begin, each in zip(state["begins"], state["held"], strict=True):
            feedback = ErrorFeedback(each["numel"], storage=self._storage, device=self._device)
            feedback.load_state_dict(each)
            whole[begin : begin + each["numel"]] = feedback.residual()
        return whole
