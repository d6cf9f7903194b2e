"""The rules by which a rank is called lost, without threads or a store."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest

from bert_fast.train.health.judgement import (
    Beat,
    BeatAges,
    Limits,
    Verdict,
    judge,
    judge_failed_collective,
    no_meeting,
)
from bert_fast.train.health.phases import (
    BLAMELESS,
    CHECKPOINT,
    COMPUTE,
    DATA,
    DONE,
    EVALUATION,
    GRADIENT_SYNC,
    LOGGING,
    METRICS_SYNC,
    STOPPING,
)

LIMITS = Limits(silent_s=10.0, phase_s=20.0, writes_s=30.0)


def beats(*phases: str, phase_s: float = 0.0) -> list[Beat]:
    """A beat of every rank, at step 1,234 of a host of its own."""
    return [Beat(1, f"node{rank}", 1234, phase, phase_s, 0.0) for rank, phase in enumerate(phases)]


def test_ranks_that_move_are_not_lost() -> None:
    assert judge(beats(COMPUTE, GRADIENT_SYNC, DATA, phase_s=20.0), [10.0] * 3, LIMITS) is None
    assert judge([], [], LIMITS) is None


def test_a_silent_rank_is_named_with_where_it_was() -> None:
    verdict = judge(beats(GRADIENT_SYNC, COMPUTE, GRADIENT_SYNC), [0.0, 10.1, 0.0], LIMITS)
    assert verdict == Verdict(1, "rank 1 (node1) has not answered for 10 s; last step 1,234, forward and backward")


@pytest.mark.parametrize("phase", [STOPPING, DONE])
def test_a_rank_that_has_ended_may_be_silent(phase: str) -> None:
    (beat,) = beats(phase, phase_s=1000.0)
    assert judge([replace(beat, writes_s=1000.0)], [1000.0], LIMITS) is None


def test_a_rank_that_writes_for_too_long_is_named() -> None:
    found = beats(GRADIENT_SYNC, GRADIENT_SYNC)
    assert judge([found[0], replace(found[1], writes_s=30.0)], [0.0, 0.0], LIMITS) is None
    verdict = judge([found[0], replace(found[1], writes_s=30.1)], [0.0, 0.0], LIMITS)
    assert verdict is not None
    assert verdict.rank == 1
    assert "has been writing its part of a checkpoint for 30 s, and is at step 1,234" in verdict.text


@pytest.mark.parametrize("phase", [DATA, COMPUTE, EVALUATION, LOGGING])
def test_a_rank_that_is_stuck_is_named(phase: str) -> None:
    verdict = judge(beats(GRADIENT_SYNC, phase, CHECKPOINT, phase_s=20.1), [0.0] * 3, LIMITS)
    assert verdict == Verdict(1, f"rank 1 (node1) has been for 20 s at step 1,234, {phase}")


@pytest.mark.parametrize("phase", sorted(BLAMELESS))
def test_who_waits_is_never_stuck(phase: str) -> None:
    assert judge(beats(phase, phase_s=math.inf), [0.0], LIMITS) is None


def test_of_ranks_that_are_stuck_those_behind_are_named() -> None:
    """The others wait for them inside a phase, as DDP does in backward."""
    found = beats(COMPUTE, DATA, COMPUTE, DATA, phase_s=21.0)
    verdict = judge(found, [0.0] * 4, LIMITS)
    assert verdict is not None
    assert verdict.text == (
        "rank 1 (node1) has been for 20 s at step 1,234, waiting for data; "
        "rank 3 (node3) has been for 20 s at step 1,234, waiting for data"
    )
    found[2] = replace(found[2], step=1233)
    verdict = judge(found, [0.0] * 4, LIMITS)
    assert verdict is not None
    assert verdict.rank == 2
    assert "rank 1" not in verdict.text


def test_silence_comes_before_writing_and_writing_before_a_phase() -> None:
    found = beats(COMPUTE, COMPUTE, COMPUTE, phase_s=21.0)
    found[1] = replace(found[1], writes_s=31.0)
    verdicts = [judge(found, ages, LIMITS) for ages in ([0.0, 0.0, 11.0], [0.0] * 3)]
    verdicts.append(judge([replace(beat, writes_s=0.0) for beat in found], [0.0] * 3, LIMITS))
    assert [verdict.rank for verdict in verdicts if verdict] == [2, 1, 0]


def test_of_many_lost_ranks_four_are_named() -> None:
    verdict = judge(beats(*[COMPUTE] * 7), [0.0] + [11.0] * 6, LIMITS)
    assert verdict is not None
    assert verdict.rank == 1
    assert verdict.text.count("has not answered") == 4
    assert verdict.text.endswith("; and 2 more")


def test_places_follow_a_step() -> None:
    """From its log line and evaluation to the next gradients; what is beside steps is after all of them."""
    order = [METRICS_SYNC, LOGGING, EVALUATION, DATA, COMPUTE, GRADIENT_SYNC, CHECKPOINT]
    places = [beat.place for beat in beats(*order)]
    assert places == sorted(places)
    assert len(set(places)) == len(places)
    assert replace(beats(METRICS_SYNC)[0], step=1235).place > places[-1]


# ---- ages -----------------------------------------------------------------------------------------------------------


def test_an_age_counts_from_when_a_beat_was_first_seen() -> None:
    ages, found = BeatAges(2, now=100.0), beats(COMPUTE, COMPUTE)
    assert ages.update(found, 103.0) == [0.0, 0.0]
    assert ages.update(found, 105.0) == [2.0, 2.0]
    assert ages.update([replace(found[0], count=2), found[1]], 106.0) == [0.0, 3.0]


def test_ranks_that_were_not_read_are_new_after_a_restart() -> None:
    ages, found = BeatAges(3, now=100.0), beats(COMPUTE, COMPUTE, COMPUTE)
    assert ages.update(found, 100.0) == [0.0] * 3
    assert ages.update(found[:1], 150.0) == [50.0]
    ages.restart(150.0)
    assert ages.update(found, 151.0) == [1.0] * 3


# ---- a collective has failed ----------------------------------------------------------------------------------------


def later(before: list[Beat], *silent: int) -> list[Beat]:
    return [beat if rank in silent else replace(beat, count=2) for rank, beat in enumerate(before)]


def test_who_does_not_beat_any_more_is_gone() -> None:
    before = beats(STOPPING, COMPUTE, COMPUTE)
    verdict = judge_failed_collective(before, later(before, 2))
    assert verdict == Verdict(2, "rank 2 (node2) does not answer; last step 1,234, forward and backward")


def test_who_has_left_may_be_silent() -> None:
    before = beats(STOPPING, DONE, GRADIENT_SYNC)
    assert judge_failed_collective(before, later(before, 0, 1)) is None


def test_if_all_answer_those_that_go_on_are_named() -> None:
    before = beats(STOPPING, COMPUTE, STOPPING)
    verdict = judge_failed_collective(before, later(before))
    assert verdict == Verdict(1, "rank 1 (node1) is still at step 1,234, forward and backward")


def test_a_lost_meeting_is_rank_0_and_its_host() -> None:
    assert no_meeting("node7") == Verdict(0, "rank 0 (node7), where the ranks meet, does not answer")
