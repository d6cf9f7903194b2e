"""Which rank was lost, on which host, at which step: every rank tells where it is, beside training and its collectives.

A thread of every rank writes a beat (a counter, step, phase) into the store at which the ranks met. Rank 0 reads them all, the
others rank 0's. A rank is called lost that is silent, or in one phase of its own, for longer than `communication.timeout_s`, or
that writes its part of a checkpoint for longer than `checkpoint.timeout_s`; `judgement` has the rules.
"""

from __future__ import annotations

import json
import os
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import astuple
from datetime import timedelta
from typing import Protocol

import torch.distributed as dist

from bert_fast.c10d import PrefixStore, Store
from bert_fast.train.environment import Environment
from bert_fast.train.health.judgement import Beat, BeatAges, Limits, Verdict, judge, judge_failed_collective, no_meeting
from bert_fast.train.health.phases import COMPUTE, DONE, STARTING, STOPPING, WAITING

_ANSWER_S = 3.0  # for which the store may keep us waiting
_HURRY_S = 6.0  # after SIGTERM: how long a rank may be silent, or we in one place, before the launcher ends us all


class BeatStore(Protocol):
    """What a heartbeat needs of the store at which the ranks met. Every method may raise RuntimeError."""

    def set(self, key: str, value: str) -> None: ...
    def get(self, key: str) -> bytes: ...
    def multi_get(self, keys: list[str]) -> list[bytes]: ...
    def check(self, keys: list[str]) -> bool: ...


def open_store() -> Store | None:
    """A connection of its own to the store at which the ranks met, for beats alone; None where one rank has nobody to watch."""
    if not dist.is_initialized() or dist.get_world_size() == 1 or dist.get_backend() == "fake":
        return None
    store = dist.distributed_c10d._get_default_store().clone()  # type: ignore[attr-defined]  # torch's stub lacks it
    store.set_timeout(timedelta(seconds=_ANSWER_S))
    restart = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    return PrefixStore(f"heartbeat{restart}", store)


class Heartbeat:
    """The beats of one rank, and its view of the others'. Without a store nothing happens."""

    def __init__(
        self,
        environment: Environment,
        store: BeatStore | None,
        timeout_s: float,
        on_lost: Callable[[Verdict], None],
        is_hurried: Callable[[], bool] = lambda: False,
    ) -> None:
        """
        Args:
            store: where the ranks leave their beats: `open_store()`.
            timeout_s: seconds for which a rank may be silent or in one phase of its own.
            on_lost: called in another thread, with the verdict, on every rank that can still hear it.
            is_hurried: whether a launcher has told this rank to end, and will not wait for `timeout_s`.
        """
        self._is_hurried = is_hurried
        self.hosts = [socket.gethostname()]
        self._rank, self._world, self._store = environment.rank, environment.world_size, store
        self._timeout_s, self._on_lost = timeout_s, on_lost
        self._interval = max(min(1.0, timeout_s / 8), self._world / 2000)  # rank 0 reads `world` keys each time
        self._count, self._where = 0, (0, STARTING, time.monotonic())
        self._writes_s: Callable[[], float] = lambda: 0.0
        self._write_limit_s = float("inf")
        self._end, self._last_word, self._wants_all, self._new_view = (threading.Event() for _ in range(4))
        self._beats: list[Beat] = []
        self._verdict: Verdict | None = None
        self._gone = False  # the store's process is
        self._answered = time.monotonic()  # when it last did

    def start(self) -> None:
        """Begin. A collective."""
        if self._store is None:
            return
        self._beat()
        dist.barrier()
        self._beats = self._read_all()
        self.hosts = [beat.host for beat in self._beats]
        self._answered = time.monotonic()
        for target in (self._talk, self._watch):
            threading.Thread(target=target, daemon=True, name=f"heartbeat{target.__name__}").start()

    def at(self, step: int, phase: str) -> None:
        """Where this rank is from now on. Costs a microsecond."""
        self._where = (step, phase, time.monotonic())

    def watch_writes(self, writes_s: Callable[[], float], limit_s: float) -> None:
        """Call a rank lost whose own part of a checkpoint takes longer than `limit_s`; `writes_s` says for how long it has."""
        self._writes_s, self._write_limit_s = writes_s, limit_s

    def stop(self) -> None:
        """The run is done: from now on this rank may be silent."""
        if self._store is not None and not self._end.is_set():
            self.at(self._where[0], DONE)
            self._end.set()
            self._last_word.wait(2 * _ANSWER_S)

    def diagnose(self) -> Verdict | None:
        """After a collective has failed: who is not there any more; None if nobody can be named. Takes seconds."""
        if self._store is None:
            return None
        self.at(self._where[0], STOPPING)
        self._wants_all.set()
        views: list[list[Beat]] = []
        deadline = time.monotonic() + _ANSWER_S + 4 * self._interval
        while time.monotonic() < deadline and len(views) < 4 and not self._gone:
            self._new_view.clear()
            if self._new_view.wait(max(0.0, deadline - time.monotonic())):
                views.append(self._beats)
        self._end.set()
        if len(views) < 4:  # a view may be from before; three after it are a beat or more of everyone apart
            return no_meeting(self.hosts[0])
        return judge_failed_collective(views[1], views[-1])

    # ---- threads ----------------------------------------------------------------------------------------------------

    def _talk(self) -> None:
        """All talk with the store, in a thread of its own: where the network is cut, an answer never comes."""
        assert self._store is not None
        while True:
            end = self._end.wait(self._interval)
            try:
                self._beat()
                if self._rank == 0 or self._wants_all.is_set():
                    self._beats = self._read_all()
                    self._new_view.set()
                else:  # somebody must watch rank 0, whose process need not be where the store is
                    self._beats = [self._read(0), *self._beats[1:]]
                if self._rank != 0:
                    self._verdict = self._read_verdict()
                elif self._verdict is not None:
                    self._store.set("lost", json.dumps(astuple(self._verdict)))
                self._answered = time.monotonic()
            except RuntimeError as error:
                self._gone = "timeout" not in str(error).lower()
                if self._gone:
                    self._new_view.set()
                    return
            if end:
                self._last_word.set()
                return

    def _watch(self) -> None:
        """Judge by this rank's own clock: all ranks on rank 0, and on the others rank 0, or all in a hurry."""
        ages = BeatAges(self._world, time.monotonic())
        while not self._end.wait(self._interval / 2):
            now = time.monotonic()
            if now - self._answered > self._timeout_s:
                self._verdict = no_meeting(self.hosts[0])
            elif self._verdict is None:
                hurried = (
                    self._is_hurried() and now - self._where[2] > _HURRY_S and self._where[1] in (*WAITING, COMPUTE)
                )
                if hurried and not self._wants_all.is_set():
                    self._wants_all.set()
                    ages.restart(now)
                beats = self._beats if self._rank == 0 or self._wants_all.is_set() else self._beats[:1]
                limits = Limits(_HURRY_S if hurried else self._timeout_s, self._timeout_s, self._write_limit_s)
                self._verdict = judge(beats, ages.update(beats, now), limits)
                if self._verdict and self._rank == 0:
                    self._end.wait(2 * self._interval)  # for the others to hear of it
            if self._verdict and not self._end.is_set():
                self._end.set()
                self._on_lost(self._verdict)
                return

    def _read_verdict(self) -> Verdict | None:
        assert self._store is not None
        return Verdict(*json.loads(self._store.get("lost"))) if self._store.check(["lost"]) else None

    def _beat(self) -> None:
        assert self._store is not None
        self._count += 1
        step, phase, since = self._where
        beat = [self._count, socket.gethostname(), step, phase, time.monotonic() - since, self._writes_s()]
        self._store.set(str(self._rank), json.dumps(beat))

    def _read(self, rank: int) -> Beat:
        assert self._store is not None
        return Beat(*json.loads(self._store.get(str(rank))))

    def _read_all(self) -> list[Beat]:
        assert self._store is not None
        found = self._store.multi_get([str(rank) for rank in range(self._world)])
        return [Beat(*json.loads(each)) for each in found]
