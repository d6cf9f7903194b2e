"""What a rank has not sent of its buckets: a residual for each, and how it passes to other buckets and other ranks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from bert_fast.communication.buckets import GradientLayout
from bert_fast.compression.error_feedback import ErrorFeedback


class Residuals:
    """A residual of every bucket, or of some of the equal shards of every bucket."""

    def __init__(
        self,
        layout: GradientLayout,
        storage: str,
        device: torch.device,
        *,
        shards: Sequence[int] = (0,),
        num_shards: int = 1,
    ) -> None:
        """
        Args:
            shards: numbers of those that it is of, which lie one after the other in a residual.
            num_shards: of each bucket.
        """
        self._layout, self._storage, self._device = layout, storage, device
        lengths = [(bucket.end - bucket.start) // num_shards for bucket in layout.buckets]
        if len(shards) == num_shards:
            shards, lengths = (0,), [n * num_shards for n in lengths]
        self._begins = [
            [bucket.start + shard * n for shard in shards] for bucket, n in zip(layout.buckets, lengths, strict=True)
        ]
        self._held = [ErrorFeedback(n * len(shards), storage=storage, device=device) for n in lengths]

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
            "begins": [list(begins) for begins in self._begins],
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
        for begins, feedback in zip(self._begins, self._held, strict=True):
            length = feedback.numel // len(begins)
            feedback.set_residual(torch.cat([total[begin : begin + length] for begin in begins]))

    def _whole(self, state: dict[str, Any]) -> torch.Tensor:
        """fp32, in the places of the old layout, with zeros where shards of the buckets were held."""
        size = max(there + n for there, n in zip(state["offsets"], self._layout.numel, strict=True))
        ends = [max(begins) + each["numel"] for begins, each in zip(state["begins"], state["held"], strict=True)]
        whole = torch.zeros(max(size, *ends), device=self._device)
        for begins, each in zip(state["begins"], state["held"], strict=True):
            feedback = ErrorFeedback(each["numel"], storage=self._storage, device=self._device)
            feedback.load_state_dict(each)
            for begin, values in zip(begins, feedback.residual().chunk(len(begins)), strict=True):
                whole[begin : begin + len(values)] = values
        return whole
