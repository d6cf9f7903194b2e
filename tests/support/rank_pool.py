"""A pool of gloo ranks that stay up between tests and answer calls.

The ranks are forked from a server that has imported torch once: a pool costs one import instead of one a rank and test.
"""

from __future__ import annotations

import traceback
from collections.abc import Callable
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

_TIMEOUT_S = 120.0


class RankPool:
    """`call(f, *args)` runs `f(rank, world, *args)` on every rank and returns the results in rank order.

    Results must be picklable without torch (numbers, NumPy arrays). A rank that raises takes the pool down, because the
    others may wait for it in a collective; the next call starts a fresh one.
    """

    def __init__(self, world: int, scratch: Path) -> None:
        self.world, self._scratch = world, scratch
        self._starts = 0
        self._pipes: list[Connection] = []
        self._processes: list[Any] = []

    def call(self, function: Callable[..., Any], *args: Any) -> list[Any]:
        if not self._processes:
            self._start()
        for pipe in self._pipes:
            pipe.send((function, args))
        answers = []
        for rank, pipe in enumerate(self._pipes):
            try:
                if not pipe.poll(_TIMEOUT_S):
                    raise TimeoutError(f"rank {rank} gave no answer in {_TIMEOUT_S:.0f} s")
                answers.append(pipe.recv())
            except (TimeoutError, EOFError) as error:
                answers.append((False, f"rank {rank}: {type(error).__name__} {error}"))
                break
        failures = [text for good, text in answers if not good]
        if failures:
            self.close()
            raise RuntimeError("\n".join(failures))
        return [value for _, value in answers]

    def _start(self) -> None:
        context = get_context("forkserver")
        context.set_forkserver_preload(["torch", "torch.distributed", "torch._dynamo", "bert_fast.train.setup.build"])
        self._starts += 1
        meeting = str(self._scratch / f"meeting-of-{self.world}-{self._starts}")
        for rank in range(self.world):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(rank, self.world, meeting, theirs), daemon=True)
            process.start()
            theirs.close()
            self._pipes.append(ours)
            self._processes.append(process)

    def close(self) -> None:
        for process in self._processes:
            process.kill()
            process.join()
        for pipe in self._pipes:
            pipe.close()
        self._processes, self._pipes = [], []


def _serve(rank: int, world: int, meeting: str, pipe: Connection) -> None:
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    dist.init_process_group("gloo", store=dist.FileStore(meeting, world), rank=rank, world_size=world)
    while True:
        try:
            function, args = pipe.recv()
        except EOFError:
            return
        try:
            pipe.send((True, function(rank, world, *args)))
        except Exception:  # the parent raises it
            pipe.send((False, f"rank {rank}: {traceback.format_exc()}"))
