"""What `communication.bucket_mb: auto` measured and chose. A run keeps it, so that it has the same buckets when resumed."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import Any

from bert_fast.communication.buckets import Ordering
from bert_fast.communication.plan import BucketPlan, Link


@dataclass(frozen=True)
class WeightRecord:
    """What the sharded variant adds: when forward needs each unit's weights, and by how much gathering them delays it."""

    needed_s: tuple[float, ...]
    gather: Link
    delay_s: float


@dataclass(frozen=True)
class BucketRecord:
    """What `auto` measured and chose. Times in seconds from the start of backward, of the latest rank."""

    units: tuple[str, ...]
    ready_s: tuple[float, ...]
    bytes: tuple[int, ...]
    link: Link
    plan: BucketPlan
    lower_bound_s: float
    weights: WeightRecord | None = None  # of the sharded variant

    def bucket_mb(self, element_bytes: int = 4, wire_bytes: int = 4) -> list[float]:
        """The plan for people, as a list for `communication.bucket_mb` of another run (MiB of gradients)."""
        edges = [0, *self.plan.ends]
        sizes = [sum(self.bytes[a:b]) for a, b in pairwise(edges)]
        return [size // wire_bytes * element_bytes / 2**20 for size in sizes]

    def summary(self) -> str:
        """One line for the log."""
        link = f"{1e3 * self.link.latency_s:.2f} ms + {self.link.bytes_per_s / 1e6:,.0f} MB/s"
        return (
            f"buckets: {len(self.plan.ends)} for a backward of {1e3 * self.ready_s[-1]:.1f} ms and a link of {link}; predicted "
            f"exposed communication {1e3 * self.plan.exposed_s:.2f} ms, at least {1e3 * self.lower_bound_s:.2f} ms"
            + (f"; weights delay forward by {1e3 * self.weights.delay_s:.2f} ms" if self.weights else "")
        )

    def as_json(self) -> dict[str, Any]:
        """For `scripts/plan_buckets.py --trace --link`."""
        return {
            "units": [
                {"name": name, "ready_s": ready, "bytes": size}
                for name, ready, size in zip(self.units, self.ready_s, self.bytes, strict=True)
            ],
            "link": asdict(self.link),
            "ends": list(self.plan.ends),
            "predicted_exposed_s": self.plan.exposed_s,
            "lower_bound_s": self.lower_bound_s,
            **({"weights": asdict(self.weights)} if self.weights else {}),
        }


def ends_of_record(record: dict[str, Any], ordering: Ordering) -> list[int] | None:
    """Where buckets end by a record that a run has kept (`as_json`); None where that is of other gradients."""
    ends, units = record.get("ends"), record.get("units")
    if not isinstance(ends, list) or not isinstance(units, list):
        return None
    names = tuple(unit.get("name") if isinstance(unit, dict) else None for unit in units)
    ascending = all(type(end) is int for end in ends) and all(a < b for a, b in pairwise([0, *ends]))
    return ends if names == ordering.unit_names and ascending and ends[-1:] == [len(names)] else None
