"""Dynamic loss scaling for fp16, kept on the device."""

from __future__ import annotations

import torch

_GROWTH_INTERVAL = 2000


class LossScale:
    """Halves after an overflow, doubles after 2,000 good steps."""

    def __init__(self, initial: float, device: torch.device) -> None:
        self.value = torch.tensor(float(initial), device=device)
        self._good_steps = torch.zeros((), device=device)

    def update(self, found_inf: torch.Tensor) -> None:
        """`found_inf`: 0-dim fp32, 1 where this step's gradient overflowed."""
        self._good_steps = torch.where(found_inf > 0, 0.0, self._good_steps + 1)
        grow = self._good_steps >= _GROWTH_INTERVAL
        self.value = torch.where(found_inf > 0, self.value * 0.5, torch.where(grow, self.value * 2.0, self.value))
        self._good_steps = torch.where(grow, 0.0, self._good_steps)

    def state_dict(self) -> dict[str, float]:
        return {"value": self.value.item(), "good_steps": self._good_steps.item()}

    def load_state_dict(self, state: dict[str, float]) -> None:
        self.value.fill_(state["value"])
        self._good_steps.fill_(state["good_steps"])
