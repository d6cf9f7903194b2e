"""A map over processes whose results come in order and never pile up in memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from itertools import islice
from multiprocessing import get_context
from typing import Any

from bert_fast.errors import UserError


class Pool:
    """`with Pool(workers) as pool: for result in pool.map(function, arguments)`."""

    def __init__(self, workers: int) -> None:
        self._workers = workers
        self._executor = ProcessPoolExecutor(workers, mp_context=get_context("forkserver"))

    def __enter__(self) -> Pool:
        return self

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        # After an error, too, no worker may still be writing when the caller tries again; only Ctrl-C does not wait
        self._executor.shutdown(wait=kind is not KeyboardInterrupt, cancel_futures=True)

    def map(self, function: Callable[..., Any], arguments: Iterator[tuple[Any, ...]]) -> Iterator[Any]:
        arguments = iter(arguments)
        pending: list[Future[Any]] = [self._executor.submit(function, *a) for a in islice(arguments, 3 * self._workers)]
        try:
            while pending:
                result = pending.pop(0).result()
                pending.extend(self._executor.submit(function, *a) for a in islice(arguments, 1))
                yield result
        except BrokenProcessPool:
            raise UserError("a worker process died (out of memory?); run again with fewer --workers") from None
