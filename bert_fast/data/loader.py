"""Batches of coming steps, prepared in a background thread while the current step computes."""

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
    """Runs `make(step)` for step = start, start + 1, ... ahead of the consumer, at most `depth` results ahead.

    An exception in `make` is raised again in `next()`. `close()` stops the thread.
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
        """The next step's result; waits for it if need be."""
        item = self._queue.get()
        if isinstance(item, BaseException):
            raise item
        return item.result

    def close(self) -> None:
        self._stop.set()
        self._thread.join(timeout=5)
