#!/usr/bin/env python3
"""run_pretraining.py with one thing that goes wrong, at a rank, step and phase given in BERT_FAST_FAULT (JSON).

    {"action": "kill" | "stop" | "hang" | "hang in a write" | "nan" | "skew" | "slow" | "alternate", "rank": 1, "step": 17,
     "phase": "forward and backward", "delay_s": 0.01, "once": "FILE that exists until it has happened"}

The product knows nothing of it: a heartbeat's phase is what is watched.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import threading
import time
from pathlib import Path
from typing import Any

VARIABLE = "BERT_FAST_FAULT"


def happen(fault: dict[str, Any], state: Any) -> None:
    """The fault itself, in the main thread or in a timer's; `state` is the run's TrainState, if it has one yet."""
    action = fault["action"]
    Path(fault["happened"]).write_text(repr(time.time()), encoding="utf-8")
    if action == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    elif action == "stop":
        os.kill(os.getpid(), signal.SIGSTOP)
    elif action == "hang":
        time.sleep(3600)
    elif action == "nan":
        import torch

        with torch.no_grad():
            next(iter(state.components.model.parameters())).fill_(float("nan"))
    elif action == "skew":
        real = time.time
        time.time = lambda: real() + 3600.0


def arm(fault: dict[str, Any]) -> None:
    """Make the fault happen when this rank says that it is there."""
    from bert_fast.train.checkpoint import train_state
    from bert_fast.train.health import heartbeat

    states: list[Any] = [None]
    init, at = train_state.TrainState.__init__, heartbeat.Heartbeat.at

    def remember(self: Any, *arguments: Any, **named: Any) -> None:
        init(self, *arguments, **named)
        states[0] = self

    def watched(self: Any, step: int, phase: str) -> None:
        at(self, step, phase)
        if step != fault["step"] or phase != fault["phase"] or not Path(fault["once"]).exists():
            return
        with contextlib.suppress(FileNotFoundError):
            os.unlink(fault["once"])
        delay = fault.get("delay_s", 0.0)
        if fault["action"] in ("hang", "nan", "skew") or not delay:
            happen(fault, states[0])
        else:
            threading.Timer(delay, happen, (fault, states[0])).start()

    train_state.TrainState.__init__ = remember  # type: ignore[method-assign]
    heartbeat.Heartbeat.at = watched  # type: ignore[method-assign]


def arm_write(fault: dict[str, Any]) -> None:
    """A disk that does not answer this rank while it writes its part of a checkpoint."""
    fsync = os.fsync

    def silent(fd: Any) -> None:
        if threading.current_thread().name == "checkpoint-writer" and Path(fault["once"]).exists():
            os.unlink(fault["once"])
            happen({**fault, "action": "hang"}, None)
        fsync(fd)

    os.fsync = silent


def slow(seconds: float) -> None:
    """Make every step last longer: time to break something around the run."""
    from bert_fast.train.health import heartbeat, phases

    at = heartbeat.Heartbeat.at

    def slowly(self: Any, step: int, phase: str) -> None:
        at(self, step, phase)
        if phase == phases.COMPUTE:
            time.sleep(seconds)

    heartbeat.Heartbeat.at = slowly  # type: ignore[method-assign]


KINDS = ("beside", "none", "waited for", "none")


def alternate() -> None:
    """Checkpoints in turn written beside training, left out, waited for, left out; `kind` is noted in their records."""
    from bert_fast.train.checkpoint.async_writer import AsyncCheckpointWriter

    start, calls = AsyncCheckpointWriter.start, [0]

    def start_one(self: Any, slices: Any, own: Any, description: Any, began: float | None = None) -> None:
        kind = KINDS[calls[0] % len(KINDS)]
        calls[0] += 1
        if kind == "none":
            self.records.append({"step": float(description["step"]), "stall_s": 0.0, "copy_s": 0.0, "total_s": 0.0})
        else:
            self.wait()  # for the one before: its tail must not be counted to this one
            start(self, slices, own, description, began)
            if kind == "waited for":
                self.wait()
        self.records[-1]["kind"] = kind

    AsyncCheckpointWriter.start = start_one  # type: ignore[method-assign]


def main() -> None:
    fault = json.loads(os.environ.get(VARIABLE, "{}"))
    if fault.get("action") == "alternate":
        alternate()
    elif fault.get("action") == "slow":
        slow(fault["seconds"])
    elif fault and os.environ.get("RANK") == str(fault["rank"]):
        (arm_write if fault["action"] == "hang in a write" else arm)(fault)
    import run_pretraining

    run_pretraining.main()


if __name__ == "__main__":
    main()
