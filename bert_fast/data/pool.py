"""A map over processes with ordered results and bounded memory. The processes end with their parent."""

from __future__ import annotations

import fcntl
import os
import select
import signal
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from itertools import islice
from multiprocessing import get_context, parent_process
from typing import Any

from bert_fast.errors import UserError


class Pool:
    """Worker processes: `with Pool(workers) as pool: for result in pool.map(function, arguments)`."""

    def __init__(self, workers: int) -> None:
        self._workers = workers
        self._executor = ProcessPoolExecutor(
            workers, mp_context=get_context("forkserver"), initializer=_end_with_parent
        )

    def __enter__(self) -> Pool:
        return self

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        # Also after an error, no worker may still be writing when the caller tries again; only Ctrl-C does not wait
        self._executor.shutdown(wait=kind is not KeyboardInterrupt, cancel_futures=True)

    def map(self, function: Callable[..., Any], arguments: Iterator[tuple[Any, ...]]) -> Iterator[Any]:
        """Results of `function(*arguments)` in order; at most three calls per worker are pending.

        Raises:
            UserError: a worker process died; and whatever `function` raises.
        """
        arguments = iter(arguments)
        pending: list[Future[Any]] = [self._executor.submit(function, *a) for a in islice(arguments, 3 * self._workers)]
        try:
            while pending:
                result = pending.pop(0).result()
                pending.extend(self._executor.submit(function, *a) for a in islice(arguments, 1))
                yield result
        except BrokenProcessPool:
            raise UserError("a worker process died (out of memory?); run again with fewer --workers") from None


def _end_with_parent() -> None:
    """Have the kernel end this worker when its parent is gone, even if it is inside of a library.

    The parent holds the other end of a pipe. When it closes, the pipe raises SIGIO, which ends the process. (The usual request,
    PR_SET_PDEATHSIG, would follow the fork server, which outlives the parent as long as there are workers.)
    """
    parent = parent_process()
    if parent is None:  # a thread of the parent, in tests
        return
    pipe = parent.sentinel
    signal.signal(signal.SIGIO, signal.SIG_DFL)
    fcntl.fcntl(pipe, fcntl.F_SETOWN, os.getpid())
    fcntl.fcntl(pipe, fcntl.F_SETFL, fcntl.fcntl(pipe, fcntl.F_GETFL) | os.O_ASYNC)
    if select.select([pipe], [], [], 0)[0]:  # it was gone before the request
        os._exit(1)
