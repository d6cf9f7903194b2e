"""Spans of time on named tracks, written as a Chrome trace (chrome://tracing, ui.perfetto.dev)."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any, NamedTuple

from bert_fast.files import write_atomically


class TraceSpan(NamedTuple):
    """One interval on a track; `start` and `end` in seconds since the trace began."""

    track: str
    name: str
    start: float
    end: float


class Trace:
    """Collects spans on named tracks, timed by the host's clock."""

    def __init__(self, mirror: Callable[[str], AbstractContextManager[object]] | None = None) -> None:
        """
        Args:
            mirror: opens the same span elsewhere, for example `torch.profiler.record_function`.
        """
        self._mirror = mirror or (lambda _name: nullcontext())
        self._origin = time.perf_counter()
        self._spans: list[TraceSpan] = []

    @contextmanager
    def span(self, track: str, name: str) -> Iterator[None]:
        """Record the block as a span."""
        end = self.begin(track, name)
        try:
            with self._mirror(f"{track}: {name}"):
                yield
        finally:
            end()

    def begin(self, track: str, name: str) -> Callable[[], None]:
        """Start a span; calling what is returned ends it, from any thread."""
        start = time.perf_counter() - self._origin
        return lambda: self._spans.append(TraceSpan(track, name, start, time.perf_counter() - self._origin))

    def spans(self) -> list[TraceSpan]:
        """All ended spans, by start."""
        return sorted(self._spans, key=lambda span: span.start)


def span_or_nothing(trace: Trace | None, track: str, name: str) -> AbstractContextManager[None]:
    """`trace.span(track, name)`, or a context that does nothing without a trace."""
    return trace.span(track, name) if trace else nullcontext()


def write_trace(
    path: Path, processes: Mapping[str, Sequence[TraceSpan]], tracks: Sequence[str], metadata: Mapping[str, Any]
) -> None:
    """Write the spans of several processes into one file.

    A viewer cannot draw overlapping spans of one track, so a later one goes to another lane of its track.

    Args:
        processes: spans by the name of their process.
        tracks: the order of tracks; others follow in the order of their first spans.
        metadata: written into the file under `otherData`.
    """
    events: list[dict[str, Any]] = []
    for pid, (process, spans) in enumerate(processes.items()):
        events.append({"ph": "M", "pid": pid, "name": "process_name", "args": {"name": process}})
        order = list(dict.fromkeys([*tracks, *(span.track for span in spans)]))
        lanes: dict[str, list[float]] = {track: [] for track in order}
        for span in spans:
            ends = lanes[span.track]
            lane = next((number for number, end in enumerate(ends) if end <= span.start), len(ends))
            ends[lane : lane + 1] = [span.end]
            events.append(
                {
                    "ph": "X",
                    "pid": pid,
                    "tid": 100 * order.index(span.track) + lane,
                    "name": span.name,
                    "cat": span.track,
                    "ts": round(1e6 * span.start, 3),
                    "dur": round(1e6 * (span.end - span.start), 3),
                }
            )
        for place, (track, ends) in enumerate(lanes.items()):
            for lane in range(len(ends)):
                key = {"ph": "M", "pid": pid, "tid": 100 * place + lane}
                events.append(
                    {**key, "name": "thread_name", "args": {"name": f"{track} {lane + 1}" if lane else track}}
                )
                events.append({**key, "name": "thread_sort_index", "args": {"sort_index": key["tid"]}})
    record = {"traceEvents": events, "displayTimeUnit": "ms", "otherData": dict(metadata)}
    write_atomically(path, json.dumps(record))
