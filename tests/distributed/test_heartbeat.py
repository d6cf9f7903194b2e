"""Who is lost, in words: silent, stuck, or gone, as every rank comes to know it."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable

import pytest
import torch
import torch.distributed as dist
from support.rank_pool import RankPool

from bert_fast.c10d import PrefixStore
from bert_fast.train.checkpoint.async_writer import OwnWork
from bert_fast.train.environment import Environment
from bert_fast.train.health.heartbeat import BeatStore, Heartbeat, open_store
from bert_fast.train.health.judgement import Verdict
from bert_fast.train.health.phases import COMPUTE, GRADIENT_SYNC

pytestmark = pytest.mark.distributed

Pools = Callable[[int], RankPool]
TIMEOUT_S = 2.0
SLACK_S = 10.0  # on a busy machine; the drill has the real bound


class UnreliableStore:
    """A part of the ranks' store of a test's own, as the pool's ranks are the same for all tests. It can fail this rank."""

    def __init__(self, name: str) -> None:
        store = open_store()
        assert store is not None
        self._store: BeatStore = PrefixStore(name, store)
        self._sent = threading.Semaphore(0)
        self.is_mute = False  # what this rank sends does not arrive, as under SIGSTOP
        self.hangs = False  # calls never come back, as behind a cut network

    def set(self, key: str, value: str) -> None:
        self._hang()
        if not self.is_mute:
            self._store.set(key, value)
        self._sent.release()

    def get(self, key: str) -> bytes:
        self._hang()
        return self._store.get(key)

    def multi_get(self, keys: list[str]) -> list[bytes]:
        self._hang()
        return self._store.multi_get(keys)

    def check(self, keys: list[str]) -> bool:
        self._hang()
        return self._store.check(keys)

    def wait_for_a_beat(self) -> None:
        """Until a beat that has begun after this call has arrived."""
        while self._sent.acquire(blocking=False):
            pass
        for _ in range(2):
            assert self._sent.acquire(timeout=TIMEOUT_S + SLACK_S)

    def _hang(self) -> None:
        if self.hangs:
            time.sleep(60)


class Beating:
    """A started heartbeat, what it has called lost, and when."""

    def __init__(self, rank: int, world: int, name: str, timeout_s: float = TIMEOUT_S) -> None:
        self.lost: list[Verdict] = []
        self.said = threading.Event()
        self.store = UnreliableStore(name)
        environment = Environment(rank, rank, world, torch.device("cpu"), torch.float32)
        self.heart = Heartbeat(environment, self.store, timeout_s, self._on_lost)
        self.heart.start()

    def _on_lost(self, verdict: Verdict) -> None:
        self.lost.append(verdict)
        self.said.set()


def stuck(rank: int, world: int) -> tuple[list[Verdict], float]:
    """Rank 1 computes for ever, the others wait for it."""
    start = time.monotonic()
    beating = Beating(rank, world, "stuck")
    beating.heart.at(7, COMPUTE if rank == 1 else GRADIENT_SYNC)
    beating.said.wait(TIMEOUT_S + 10)
    return beating.lost, time.monotonic() - start


def test_a_rank_that_is_stuck_is_named_on_all_ranks(pool: Pools) -> None:
    for lost, seconds in pool(3).call(stuck):
        (verdict,) = lost
        assert verdict.rank == 1
        assert verdict.text.startswith("rank 1 (")
        assert "has been for 2 s at step 7, forward and backward" in verdict.text
        assert TIMEOUT_S <= seconds <= TIMEOUT_S + SLACK_S


def writing(rank: int, world: int) -> tuple[list[Verdict], float]:
    """Rank 1's disk does not answer while it writes a checkpoint; training goes on, on all ranks."""
    start = time.monotonic()
    beating = Beating(rank, world, "writing")
    own_work = OwnWork()
    beating.heart.watch_writes(own_work.seconds, 1.0)
    with own_work if rank == 1 else contextlib.nullcontext():
        while not beating.said.is_set() and time.monotonic() < start + 1.0 + SLACK_S:
            beating.heart.at(12, COMPUTE)
            time.sleep(0.1)
            beating.heart.at(12, GRADIENT_SYNC)
    return beating.lost, time.monotonic() - start


def test_a_rank_that_hangs_while_it_writes_a_checkpoint_is_named(pool: Pools) -> None:
    for lost, seconds in pool(3).call(writing):
        (verdict,) = lost
        assert verdict.rank == 1
        assert "has been writing its part of a checkpoint for 1 s, and is at step 12" in verdict.text
        assert "rank 0" not in verdict.text
        assert 1.0 <= seconds <= 1.0 + SLACK_S


def silent(rank: int, world: int) -> tuple[list[Verdict], float]:
    """Rank 2 says nothing any more, as under SIGSTOP."""
    beating = Beating(rank, world, "silent")
    beating.heart.at(9, GRADIENT_SYNC)
    beating.store.wait_for_a_beat()
    dist.barrier()
    start = time.monotonic()
    if rank == 2:
        beating.store.is_mute = True
        return [], 0.0
    beating.said.wait(TIMEOUT_S + 10)
    return beating.lost, time.monotonic() - start


def test_a_rank_that_is_silent_is_named_on_the_others(pool: Pools) -> None:
    for lost, seconds in pool(3).call(silent)[:2]:
        (verdict,) = lost
        assert verdict.rank == 2
        assert "has not answered for 2 s; last step 9, gradient synchronisation" in verdict.text
        assert seconds <= TIMEOUT_S + SLACK_S


def healthy(rank: int, world: int) -> list[Verdict]:
    """Phases change, waiting for others lasts, and ranks end at different times."""
    patience_s = 4.0  # a busy machine is no reason
    beating = Beating(rank, world, "healthy", patience_s)
    for step in range(8):
        beating.heart.at(step, COMPUTE)
        time.sleep(0.15)
    beating.heart.at(8, GRADIENT_SYNC)
    time.sleep(1.5 * patience_s)
    beating.heart.stop()
    time.sleep(1.0 * rank)
    return beating.lost


def test_nobody_is_blamed_without_reason(pool: Pools) -> None:
    assert pool(3).call(healthy) == [[], [], []]


def diagnosed(rank: int, world: int) -> tuple[Verdict | None, float]:
    """A collective has failed: rank 1 was killed, the others ask who it was."""
    beating = Beating(rank, world, "diagnosed", 4.0)
    beating.heart.at(11, COMPUTE)
    beating.store.wait_for_a_beat()
    beating.store.is_mute = rank == 1
    dist.barrier()
    if rank == 1:
        beating.heart.stop()
        return None, 0.0
    start = time.monotonic()
    return beating.heart.diagnose(), time.monotonic() - start


def test_after_a_failed_collective_the_dead_rank_is_named(pool: Pools) -> None:
    for verdict, seconds in pool(3).call(diagnosed)[::2]:
        assert verdict.rank == 1
        assert "does not answer; last step 11, forward and backward" in verdict.text
        assert seconds < 10


def test_one_rank_has_nobody_to_lose() -> None:
    environment = Environment(0, 0, 1, torch.device("cpu"), torch.float32)
    heart = Heartbeat(environment, open_store(), 1.0, lambda _verdict: None)
    heart.start()
    heart.at(1, COMPUTE)
    assert heart.diagnose() is None
    heart.stop()
    assert len(heart.hosts) == 1


def unreachable(rank: int, world: int) -> tuple[list[Verdict], float, Verdict | None]:
    """Rank 0's store answers no more, as behind a cut network: calls into it never come back."""
    beating = Beating(rank, world, "unreachable")
    beating.heart.at(3, GRADIENT_SYNC)
    if rank == 0:
        beating.heart.stop()
        return [], 0.0, None
    beating.store.hangs = True
    start = time.monotonic()
    beating.said.wait(TIMEOUT_S + 10)
    return beating.lost, time.monotonic() - start, beating.heart.diagnose()


def test_a_store_that_never_answers_is_rank_0_lost(pool: Pools) -> None:
    (lost,), seconds, diagnosis = pool(2).call(unreachable)[1]
    assert lost == diagnosis
    assert lost.rank == 0
    assert "where the ranks meet, does not answer" in lost.text
    assert seconds <= TIMEOUT_S + SLACK_S
