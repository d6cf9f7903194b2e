"""Named tracks of what happened when, as a Chrome trace (chrome://tracing, ui.perfetto.dev)."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any, NamedTuple

from bert_fast.files import write_atomically


class Span(NamedTuple):
    """Something that went on, on a track; seconds since the trace began."""

    track: str
    name: str
    start: float
    end: float


class Trace:
    """Spans on named tracks, by the host's clock."""

    def __init__(self, mirror: Callable[[str], AbstractContextManager[object]] | None = None) -> None:
        """
        Args:
            mirror: opens the same span elsewhere, `torch.profiler.record_function` for example.
        """
        self._mirror = mirror or (lambda _name: nullcontext())
        self._origin = time.perf_counter()
        self._spans: list[Span] = []

    @contextmanager
    def span(self, track: str, name: str) -> Iterator[None]:
        """Around something the host does."""
        end = self.begin(track, name)
        try:
            with self._mirror(f"{track}: {name}"):
                yield
        finally:
            end()

    def begin(self, track: str, name: str) -> Callable[[], None]:
        """Start a span that another place or thread may end: call what is returned."""
        start = time.perf_counter() - self._origin
        return lambda: self._spans.append(Span(track, name, start, time.perf_counter() - self._origin))

    def spans(self) -> list[Span]:
        """All ended spans, by start."""
        return sorted(self._spans, key=lambda span: span.start)


def span_or_nothing(trace: Trace | None, track: str, name: str) -> AbstractContextManager[None]:
    """`trace.span` where there is a trace."""
    return trace.span(track, name) if trace else nullcontext()


def write_trace(
    path: Path, processes: Mapping[str, Sequence[Span]], tracks: Sequence[str], metadata: Mapping[str, Any]
) -> None:
    """Write the spans of several processes into one file.

    A viewer cannot draw spans of one track that overlap: a later one goes to a further lane of its track.

    Args:
        tracks: the order of tracks; others follow in the order of their first spans.
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
