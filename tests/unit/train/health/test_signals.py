"""Signals become a flag."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator

import pytest

from bert_fast.train.health.signals import HANDLED, StopFlag


@pytest.fixture
def stop() -> Iterator[StopFlag]:
    before = {number: signal.getsignal(number) for number in HANDLED}
    yield StopFlag()
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", HANDLED, ids=lambda n: n.name)
def test_signals_set_the_flag_and_say_which(stop: StopFlag, number: signal.Signals) -> None:
    assert stop.number == 0
    os.kill(os.getpid(), number)
    assert stop.number == number
