"""Named tracks of what happened when, as a Chrome trace (chrome://tracing, ui.perfetto.dev)."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path

from bert_fast.files import write_atomically


class Trace:
    """Spans on named tracks, by the host's clock. A track is made by its first span; tracks keep that order."""

    def __init__(self, mirror: Callable[[str], AbstractContextManager[object]] | None = None) -> None:
        """
        Args:
            mirror: opens the same span elsewhere, `torch.profiler.record_function` for example.
        """
        self._mirror = mirror or (lambda _name: nullcontext())
        self._origin = time.perf_counter()
        self._spans: list[tuple[str, str, float, float]] = []

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
        """Start a span that another thread may end: call what is returned."""
        start = time.perf_counter()
        return lambda: self._spans.append((track, name, start, time.perf_counter()))

    def spans(self) -> list[tuple[str, str, float, float]]:
        """(track, name, start, end) in seconds since this trace began, by start."""
        return sorted(
            ((track, name, a - self._origin, b - self._origin) for track, name, a, b in self._spans), key=lambda s: s[2]
        )

    def clear(self) -> None:
        """Forget all spans; time goes on."""
        self._spans.clear()

    def write(self, path: Path, process: str, metadata: dict[str, object] | None = None) -> None:
        """Write a trace whose one process is called `process`."""
        # A viewer cannot draw spans of one track that overlap: a later one goes to a further lane of the track.
        spans = self.spans()
        order = list(dict.fromkeys(track for track, *_ in spans))
        lanes: dict[str, list[float]] = {track: [] for track in order}
        events: list[dict[str, object]] = []
        for track, name, start, end in spans:
            free = next((lane for lane, until in enumerate(lanes[track]) if until <= start), len(lanes[track]))
            lanes[track][free : free + 1] = [end]
            events.append({
                "ph": "X", "pid": 0, "tid": 100 * order.index(track) + free, "name": name, "cat": track,
                "ts": round(1e6 * start, 3), "dur": round(1e6 * (end - start), 3),
            })  # fmt: skip
        names: list[dict[str, object]] = [{"ph": "M", "pid": 0, "name": "process_name", "args": {"name": process}}]
        for track, used in lanes.items():
            for lane in range(len(used)):
                place = {"ph": "M", "pid": 0, "tid": 100 * order.index(track) + lane}
                names.append(
                    {**place, "name": "thread_name", "args": {"name": track if lane == 0 else f"{track} {lane + 1}"}}
                )
                names.append({**place, "name": "thread_sort_index", "args": {"sort_index": place["tid"]}})
        record = {"traceEvents": names + events, "displayTimeUnit": "ms", "otherData": metadata or {}}
        write_atomically(path, json.dumps(record))
