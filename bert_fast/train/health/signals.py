"""Signals become a flag that is read at step boundaries."""

from __future__ import annotations

import signal
from types import FrameType

HANDLED = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)


class StopFlag:
    """Set by SIGINT, SIGTERM or SIGUSR1: `number` is the last signal's, 0 before the first."""

    def __init__(self) -> None:
        self.number = 0
        for number in HANDLED:
            signal.signal(number, self._set)

    def _set(self, number: int, _frame: FrameType | None) -> None:
        self.number = number
