"""Signals become a flag that is read at step boundaries."""

from __future__ import annotations

import signal
from types import FrameType

HANDLED = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)


class StopFlag:
    """Set by SIGINT, SIGTERM or SIGUSR1. `number` says which, 0 none."""

    def __init__(self) -> None:
        self.number = 0
        self._previous = {number: signal.signal(number, self._set) for number in HANDLED}

    def _set(self, number: int, _frame: FrameType | None) -> None:
        self.number = number

    def restore(self) -> None:
        """Put the former handlers back."""
        for number, handler in self._previous.items():
            signal.signal(number, handler)
