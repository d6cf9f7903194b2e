"""Errors meant for a person: one line that says what is wrong, where, and how to mend it."""

from __future__ import annotations


class UserError(ValueError):
    """Something the user can mend. Entry points print it as one line and exit with status 2."""


class TrainingError(RuntimeError):
    """A run that cannot go on (non-finite loss, damaged data). Entry points exit with status 3."""


class LostRankError(RuntimeError):
    """Another rank is gone or silent. Entry points exit with status 4."""
