"""Prepares the batches of coming steps in a background thread while the current step computes."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, TypeVar

T = TypeVar("T")


@dataclass(frozen=True)
class _Made(Generic[T]):
    result: T


class Prefetcher(Generic[T]):
    """Runs `make(step)` for step = start ... end - 1 in a thread, at most `depth` results ahead of the consumer.

    `next()` raises what `make` raised. `close()` stops the thread.
    """

    def __init__(self, make: Callable[[int], T], start: int, end: int, depth: int) -> None:
        self._queue: queue.Queue[_Made[T] | BaseException] = queue.Queue(depth)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, args=(make, start, end), daemon=True, name="prefetch")
        self._thread.start()

    def _run(self, make: Callable[[int], T], start: int, end: int) -> None:
        for step in range(start, end):
            try:
                item: _Made[T] | BaseException = _Made(make(step))
            except BaseException as error:  # handed to the consumer, which raises it
                item = error
            while not self._stop.is_set():
                try:
                    self._queue.put(item, timeout=0.1)
                    break
                except queue.Full:
                    continue
            if self._stop.is_set() or isinstance(item, BaseException):
                return

    def next(self) -> T:
        """The result of the next step; waits for it if necessary. Raises what `make` raised."""
        item = self._queue.get()
        if isinstance(item, BaseException):
            raise item
        return item.result

    def close(self) -> None:
        """Stop the thread after the step that it works on; waits at most 5 s."""
        self._stop.set()
        self._thread.join(timeout=5)
