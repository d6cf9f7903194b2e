"""A link between machines that one does not have: collectives become waits, in the order and with the streams of real ones.

NCCL runs the collectives of a communicator one after the other on a stream of its own, which first waits for the stream that
called it; `wait` makes the calling stream wait for the end, not the host. Here the collective is a kernel that spins for
latency + bytes / bandwidth. Real collectives also take multiprocessors and memory bandwidth from backward: that is not
modelled. On a CPU the link is a moment until which it is busy.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist

from bert_fast.communication.ddp import DdpEngine
from bert_fast.communication.plan import Link
from bert_fast.communication.wire_format import WireFormat

from .timing import repeat

_SPIN = 5_000_000  # cycles of the calibrating kernel


class Pending:
    """A collective under way, as `torch.distributed.Work`."""

    def __init__(self, end: Any) -> None:
        self._end = end

    def wait(self) -> None:
        if isinstance(self._end, float):
            time.sleep(max(0.0, self._end - time.perf_counter()))
        elif self._end is not None:
            torch.cuda.current_stream().wait_event(self._end)


class ModelledLink:
    """Collectives over `link`; None sends nothing and takes no time."""

    def __init__(self, device: str) -> None:
        self.link: Link | None = None
        self._stream = torch.cuda.Stream() if device == "cuda" else None
        self._busy_until = 0.0
        self._cycles_per_s = 0.0
        if device == "cuda":
            self._cycles_per_s = _SPIN / min(repeat(lambda: torch.cuda._sleep(_SPIN), device, 5))

    def start(self, num_bytes: int) -> Pending:
        """Begin the next collective behind those that are under way."""
        if self.link is None:
            return Pending(None)
        seconds = float(self.link(num_bytes))
        if self._stream is None:
            self._busy_until = max(self._busy_until, time.perf_counter()) + seconds
            return Pending(self._busy_until)
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            torch.cuda._sleep(int(seconds * self._cycles_per_s))
            end = torch.cuda.Event()
            end.record()
        return Pending(end)

    def future(self, buffer: torch.Tensor) -> torch.futures.Future[torch.Tensor]:
        """As `start`, for DDP's hook: a future that holds the buffer when the collective has ended."""
        pending = self.start(buffer.numel() * buffer.element_size())
        if self._stream is None:
            promise: torch.futures.Future[torch.Tensor] = torch.futures.Future()

            def end() -> None:
                pending.wait()
                promise.set_result(buffer)

            threading.Thread(target=end, daemon=True).start()
            return promise
        promise, caller = torch.futures.Future(devices=[buffer.device]), torch.cuda.current_stream()
        with torch.cuda.stream(self._stream):  # the result is ready when this stream is here
            if self.link is None:
                self._stream.wait_stream(caller)
            promise.set_result(buffer)
        return promise


class LinkWire(WireFormat):
    """Whole buckets over a modelled link."""

    def __init__(self, dtype: torch.dtype, link: ModelledLink) -> None:
        super().__init__(dtype)
        self._link = link

    def all_reduce(
        self, number: int, wire: torch.Tensor, values: torch.Tensor, group: dist.ProcessGroup | None
    ) -> Iterator[Any]:
        self.count(wire)
        yield self._link.start(wire.numel() * wire.element_size())
        self.decode(wire, values)


class LinkDdp(DdpEngine):
    """DistributedDataParallel with the same wait in its hook."""

    link: ModelledLink

    def _average(self, number: int, buffer: torch.Tensor) -> torch.futures.Future[torch.Tensor]:
        return self.link.future(buffer)
