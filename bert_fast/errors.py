"""Errors meant for the user: one line that says what is wrong, where, and how to fix it."""

from __future__ import annotations


class UserError(ValueError):
    """Something the user can fix. Programs print it as one line and exit with `ExitCode.USER_ERROR`."""


class TrainingError(RuntimeError):
    """A run that cannot go on (non-finite loss, damaged data). Programs exit with `ExitCode.TRAINING_ERROR`."""


class LostRankError(RuntimeError):
    """Another rank is gone or silent. Programs exit with `ExitCode.LOST_RANK`.

    Attributes:
        rank: the rank that was lost, the first of several; None where it is not known.
        last_seen: how this rank saw it last, in words that begin with its name; empty where it is not known.
    """

    def __init__(self, text: str, rank: int | None = None, last_seen: str = "") -> None:
        super().__init__(text)
        self.rank, self.last_seen = rank, last_seen
