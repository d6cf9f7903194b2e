"""Batches of coming steps, prepared in a background thread while the current step computes."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from typing import Any, Generic, TypeVar

T = TypeVar("T")


class Prefetcher(Generic[T]):
    """Runs `make(step)` for step = start, start + 1, ... ahead of the consumer, at most `depth` results ahead.

    An exception in `make` is raised again in `next()`. `close()` stops the thread.
    """

    def __init__(self, make: Callable[[int], T], start: int, end: int, depth: int) -> None:
        self._queue: queue.Queue[tuple[T | None, BaseException | None]] = queue.Queue(depth)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, args=(make, start, end), daemon=True, name="prefetch")
        self._thread.start()

    def _run(self, make: Callable[[int], T], start: int, end: int) -> None:
        for step in range(start, end):
            try:
                item: tuple[Any, BaseException | None] = (make(step), None)
            except BaseException as error:  # handed to the consumer, which raises it
                item = (None, error)
            while not self._stop.is_set():
                try:
                    self._queue.put(item, timeout=0.1)
                    break
                except queue.Full:
                    continue
            if self._stop.is_set() or item[1] is not None:
                return

    def next(self) -> T:
        """The next step's result; waits for it if need be."""
        item, error = self._queue.get()
        if error is not None:
            raise error
        return item  # type: ignore[return-value]

    def close(self) -> None:
        self._stop.set()
        self._thread.join(timeout=5)
