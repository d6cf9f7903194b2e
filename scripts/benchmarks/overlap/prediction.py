"""What a cycle of a variant should take: its host work measured without communication, the planner's timeline for the rest."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from typing import Any

import numpy as np

from .variants import Instance, Links, SilentWire


def measure_host(silent: Instance, repeats: int = 2) -> dict[str, list[float] | float]:
    """Medians of a silent cycle, in seconds from its start: when buckets leave, backward's end, the cycle's end."""
    assert isinstance(silent.wire, SilentWire)
    left, backward, ends = [], [], []
    model = silent.model
    assert model is not None
    marks: list[float] = []
    finish = silent.engine.finish

    def finished(*args: object) -> object:
        marks.append(time.perf_counter())
        return finish(*args)

    silent.engine.finish = finished
    for _ in range(repeats + 1):
        silent.wire.left.clear()
        marks.clear()
        start = time.perf_counter()
        silent.cycle()
        ends.append(time.perf_counter() - start)
        left.append([at - start for at in silent.wire.left])
        backward.append(marks[0] - start)
    return {
        "left": np.median(np.array(left[1:]), axis=0).tolist(),
        "backward": statistics.median(backward[1:]),
        "end": statistics.median(ends[1:]),
    }


def predict(instance: Instance, host: dict[str, Any], links: Links, forward_s: list[float], update_s: float) -> float:
    """Seconds of a cycle.

    Args:
        host: of `measure_host` of the same variant (the latest rank's).
        forward_s: what the forward pass waits in the layers of each bucket, in the order of buckets.
        update_s: what the update of all elements waits.
    """
    variant = instance.variant
    width = 2 if variant.wire == "bf16" else 4
    sizes = [n * width for n in instance.numel]
    link = links.reduce_scatter if variant.shard else links.all_reduce
    shares = [n / sum(instance.numel) for n in instance.numel]

    def cycle_from(shift: float) -> float:
        """When the last weight is new, if forward ends `shift` later than without communication."""
        done, times = 0.0, []
        for left, size in zip(host["left"], sizes, strict=True):
            done = max(done, left + shift) + float(link(size))
            times.append(done)
        backward = max(host["backward"], host["left"][-1] if variant.clip == "global_before_reduce" else 0.0) + shift
        tail = host["end"] + shift - backward  # updates, norms and whatever else the host does after backward
        if not variant.step_per_bucket:
            return max(done, backward) + tail
        now = backward
        for end, share in zip(times, shares, strict=True):
            now = max(now, end) + tail * share
        return now

    if not variant.shard:
        return cycle_from(0.0)
    # The next forward: weights arrive from the last bucket to the first, a layer waits for its own.
    arrived, now = 0.0, 0.0
    for size, wait in zip(sizes[::-1], forward_s[::-1], strict=True):
        arrived += float(links.all_gather(size))
        now = max(now, arrived) + wait
    return cycle_from(now - sum(forward_s))


def lower_bound(
    instance: Instance, host: dict[str, Any], links: Links, unit_bytes: Sequence[float], ready_s: Sequence[float]
) -> float:
    """No plan of unsharded all-reduces and updates at the end can be faster: seconds of a cycle.

    Args:
        unit_bytes, ready_s: of the units, in ready order, seconds since the start of the cycle.
    """
    link = links.all_reduce
    least = max(ready_s[-1] + float(link(unit_bytes[-1])), ready_s[0] + float(link(sum(unit_bytes))))
    return max(least, host["backward"]) + host["end"] - host["backward"]
