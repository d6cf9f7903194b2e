"""The exit codes of every program: the one place that has the numbers. Standard library only."""

from __future__ import annotations

from enum import IntEnum


class ExitCode(IntEnum):
    """What a process says of its end. docs/running.md has the same table for users.

    A process that a signal has stopped ends with `of_signal(number)`, of which only Ctrl-C's and that of a closed pipe are
    members here.
    """

    OK = 0
    TARGET_MISSED = 1  # it ran to its end, and the answer is no: target not reached, a check that failed
    USER_ERROR = 2  # something for the user to fix: config, data, machine, a missing package
    TRAINING_ERROR = 3  # the run cannot go on: its loss is not finite, its memory is too small
    LOST_RANK = 4  # another rank is gone or silent
    BUG = 70  # sysexits.h: EX_SOFTWARE
    INTERRUPTED = 130  # 128 + SIGINT, as a shell reports it
    PIPE = 141  # 128 + SIGPIPE: nobody reads the output any more

    @property
    def restartable(self) -> bool:
        """Whether another start from the last checkpoint may succeed without the user changing anything."""
        return self in (ExitCode.TRAINING_ERROR, ExitCode.LOST_RANK, ExitCode.BUG)


def is_restartable(code: int) -> bool:
    """`ExitCode.restartable` of any number; False for one that is not in the table."""
    return any(code == each and each.restartable for each in ExitCode)


def of_signal(number: int) -> int:
    """The exit code of a process that signal `number` has stopped, as a shell reports it."""
    return 128 + number
