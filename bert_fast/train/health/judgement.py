"""Which rank is lost, judged from what all ranks last said of themselves: silent, writing for too long, or stuck.

Pure functions over beats and ages: who reads them, when and from where is `heartbeat`'s.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from bert_fast.train.health.phases import BLAMELESS, ENDED, STEP_ORDER

_NUM_NAMED = 4  # ranks in a verdict's text; of more it says how many


@dataclass(frozen=True)
class Beat:
    """What a rank last said of itself."""

    count: int
    host: str
    step: int
    phase: str
    phase_s: float
    writes_s: float  # for which it has been writing its own part of a checkpoint, beside that phase; 0: it is not

    @property
    def place(self) -> tuple[int, int]:
        """How far it has come."""
        return self.step, STEP_ORDER.index(self.phase) if self.phase in STEP_ORDER else len(STEP_ORDER)

    def text(self) -> str:
        return f"step {self.step:,}, {self.phase}"


@dataclass(frozen=True)
class Verdict:
    """Which rank is lost: the first of several, and what is known of all of them, in words that begin with its name."""

    rank: int
    text: str


@dataclass(frozen=True)
class Limits:
    """Seconds for which a rank may go on without being called lost."""

    silent_s: float  # without a new beat
    phase_s: float  # in one phase of its own
    writes_s: float  # with its own part of a checkpoint


class BeatAges:
    """For how long every rank's beat has been the same, by the clock of the one who reads: clocks of hosts may differ."""

    def __init__(self, num_ranks: int, now: float) -> None:
        """`now`, here and below: seconds of one clock that never goes back."""
        self._counts = [-1] * num_ranks
        self._changed = [now] * num_ranks

    def restart(self, now: float) -> None:
        """Every beat counts as new: the ranks were not read until now."""
        self._changed = [now] * len(self._changed)

    def update(self, beats: Sequence[Beat], now: float) -> list[float]:
        """Take in the newest beats, those of ranks 0, 1, ...; all of them or the first few. Returns their ages in seconds."""
        for rank, beat in enumerate(beats):
            if beat.count != self._counts[rank]:
                self._counts[rank], self._changed[rank] = beat.count, now
        return [now - changed for changed in self._changed[: len(beats)]]


def judge(beats: Sequence[Beat], ages: Sequence[float], limits: Limits) -> Verdict | None:
    """The verdict over ranks 0, 1, ... while they train, from their beats and the beats' ages in seconds.

    Silence comes first, then writing, then a phase: who does not answer is the reason for what the others wait for. A rank that
    waits for others, or has ended, is never blamed.
    """
    alive = [rank for rank, beat in enumerate(beats) if beat.phase not in ENDED]
    silent = [rank for rank in alive if ages[rank] > limits.silent_s]
    if silent:
        return _name(silent, beats, f"has not answered for {limits.silent_s:.0f} s; last")
    writing = [rank for rank in alive if beats[rank].writes_s > limits.writes_s]
    if writing:
        what = f"has been writing its part of a checkpoint for {limits.writes_s:.0f} s, and is at"
        return _name(writing, beats, what)
    stuck = [rank for rank in alive if beats[rank].phase not in BLAMELESS and beats[rank].phase_s > limits.phase_s]
    # Who waits inside a phase (DDP in backward) for a rank that is behind is not the one
    behind = [rank for rank in stuck if beats[rank].place == min(beats[other].place for other in stuck)]
    return _name(behind, beats, f"has been for {limits.phase_s:.0f} s at") if behind else None


def judge_failed_collective(before: Sequence[Beat], after: Sequence[Beat]) -> Verdict | None:
    """The verdict after a collective has failed, from all ranks' beats at two times that are a beat or more apart.

    A rank that has not beaten in between is gone; if none is, those are named that have not noticed the failure.
    """
    silent = [
        rank
        for rank, (a, b) in enumerate(zip(before, after, strict=True))
        if a.count == b.count and b.phase not in ENDED
    ]
    if silent:
        return _name(silent, after, "does not answer; last")
    present = [rank for rank, beat in enumerate(after) if beat.phase not in BLAMELESS]
    return _name(present, after, "is still at") if present else None


def no_meeting(host: str) -> Verdict:
    """The verdict where the store at which the ranks met, on rank 0's `host`, does not answer."""
    return Verdict(0, f"rank 0 ({host}), where the ranks meet, does not answer")


def _name(ranks: list[int], beats: Sequence[Beat], what: str) -> Verdict:
    shown = [f"rank {rank} ({beats[rank].host}) {what} {beats[rank].text()}" for rank in ranks[:_NUM_NAMED]]
    more = f"; and {len(ranks) - _NUM_NAMED} more" if len(ranks) > _NUM_NAMED else ""
    return Verdict(ranks[0], "; ".join(shown) + more)
