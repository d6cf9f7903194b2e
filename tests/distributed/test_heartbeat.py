"""Who is lost, in words: silent, stuck, or gone, as every rank comes to know it."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from support.rank_pool import RankPool

from bert_fast.train.checkpoint.async_writer import OwnWork
from bert_fast.train.environment import Environment
from bert_fast.train.health.heartbeat import COMPUTE, GRADIENT_SYNC, Heartbeat, Verdict

pytestmark = pytest.mark.distributed

Pools = Callable[[int], RankPool]
TIMEOUT_S = 2.0
SLACK_S = 10.0  # on a busy machine; the drill has the real bound


def beating(
    rank: int, world: int, name: str, timeout_s: float = TIMEOUT_S
) -> tuple[Heartbeat, list[Verdict], threading.Event]:
    """A started heartbeat in a part of the store of its own, what it has called lost, and when."""
    lost: list[Verdict] = []
    said = threading.Event()

    def on_lost(verdict: Verdict) -> None:
        lost.append(verdict)
        said.set()

    heart = Heartbeat(Environment(rank, rank, world, torch.device("cpu"), torch.float32), timeout_s, on_lost)
    heart._store = dist.PrefixStore(name, heart._store)  # the pool's ranks are the same for all tests
    heart.start()
    return heart, lost, said


def stuck(rank: int, world: int) -> tuple[list[Verdict], float]:
    """Rank 1 computes for ever, the others wait for it."""
    start = time.monotonic()
    heart, lost, said = beating(rank, world, "stuck")
    heart.at(7, COMPUTE if rank == 1 else GRADIENT_SYNC)
    said.wait(TIMEOUT_S + 10)
    return lost, time.monotonic() - start


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
    heart, lost, said = beating(rank, world, "writing")
    own_work = OwnWork()
    heart.watch_writes(own_work.seconds, 1.0)
    with own_work if rank == 1 else contextlib.nullcontext():
        while not said.is_set() and time.monotonic() < start + 1.0 + SLACK_S:
            heart.at(12, COMPUTE)
            time.sleep(0.1)
            heart.at(12, GRADIENT_SYNC)
    return lost, time.monotonic() - start


def test_a_rank_that_hangs_while_it_writes_a_checkpoint_is_named(pool: Pools) -> None:
    for lost, seconds in pool(3).call(writing):
        (verdict,) = lost
        assert verdict.rank == 1
        assert "has been writing its part of a checkpoint for 1 s, and is at step 12" in verdict.text
        assert "rank 0" not in verdict.text
        assert 1.0 <= seconds <= 1.0 + SLACK_S


def silent(rank: int, world: int) -> tuple[list[Verdict], float]:
    """Rank 2 says nothing any more, as under SIGSTOP."""
    heart, lost, said = beating(rank, world, "silent")
    heart.at(9, GRADIENT_SYNC)
    heart._beat()
    dist.barrier()
    start = time.monotonic()
    if rank == 2:
        heart._end.set()
        heart._beat = lambda: None  # type: ignore[method-assign]
        return [], 0.0
    said.wait(TIMEOUT_S + 10)
    return lost, time.monotonic() - start


def test_a_rank_that_is_silent_is_named_on_the_others(pool: Pools) -> None:
    for lost, seconds in pool(3).call(silent)[:2]:
        (verdict,) = lost
        assert verdict.rank == 2
        assert "has not answered for 2 s; last step 9, gradient synchronisation" in verdict.text
        assert seconds <= TIMEOUT_S + SLACK_S


def healthy(rank: int, world: int) -> list[Verdict]:
    """Phases change, waiting for others lasts, and ranks end at different times."""
    patience_s = 4.0  # a busy machine is no reason
    heart, lost, _ = beating(rank, world, "healthy", patience_s)
    for step in range(8):
        heart.at(step, COMPUTE)
        time.sleep(0.15)
    heart.at(8, GRADIENT_SYNC)
    time.sleep(1.5 * patience_s)
    heart.stop()
    time.sleep(1.0 * rank)
    return lost


def test_nobody_is_blamed_without_reason(pool: Pools) -> None:
    assert pool(3).call(healthy) == [[], [], []]


def diagnosed(rank: int, world: int) -> tuple[Verdict | None, float]:
    """A collective has failed: rank 1 was killed, the others ask who it was."""
    heart, _, _ = beating(rank, world, "diagnosed", 4.0)
    heart.at(11, COMPUTE)
    if rank == 1:
        heart._beat()
        heart._beat = lambda: None  # type: ignore[method-assign]
    dist.barrier()
    if rank == 1:
        time.sleep(8)
        heart._end.set()
        return None, 0.0
    start = time.monotonic()
    return heart.diagnose(), time.monotonic() - start


def test_after_a_failed_collective_the_dead_rank_is_named(pool: Pools) -> None:
    for verdict, seconds in pool(3).call(diagnosed)[::2]:
        assert verdict.rank == 1
        assert "does not answer; last step 11, forward and backward" in verdict.text
        assert seconds < 10


def test_one_rank_has_nobody_to_lose() -> None:
    heart = Heartbeat(Environment(0, 0, 1, torch.device("cpu"), torch.float32), 1.0, lambda _verdict: None)
    heart.start()
    heart.at(1, COMPUTE)
    assert heart.diagnose() is None
    heart.stop()
    assert len(heart.hosts) == 1


def unreachable(rank: int, world: int) -> tuple[list[Verdict], float, Verdict | None]:
    """Rank 0's store answers no more, as behind a cut network: calls into it never come back."""
    heart, lost, said = beating(rank, world, "unreachable")
    heart.at(3, GRADIENT_SYNC)
    if rank == 0:
        heart._end.set()
        time.sleep(TIMEOUT_S + 6)
        return [], 0.0, None

    def never(*_: Any) -> None:
        time.sleep(60)

    heart._beat = never  # type: ignore[method-assign]
    start = time.monotonic()
    said.wait(TIMEOUT_S + 10)
    return lost, time.monotonic() - start, heart.diagnose()


def test_a_store_that_never_answers_is_rank_0_lost(pool: Pools) -> None:
    (lost,), seconds, diagnosis = pool(2).call(unreachable)[1]
    assert lost == diagnosis
    assert lost.rank == 0
    assert "where the ranks meet, does not answer" in lost.text
    assert seconds <= TIMEOUT_S + SLACK_S
