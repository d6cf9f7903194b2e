"""What a failed collective means, from the words of c10d, gloo and NCCL: they raise a plain RuntimeError for everything.

The one place that reads these words. Without torch.
"""

from __future__ import annotations

from enum import Enum

from bert_fast.errors import LostRankError, TrainingError

_LOST_RANK = (
    "gloo",
    "Gloo",
    "NCCL",
    "Connection closed",
    "Connection reset",
    "Broken pipe",
    "pair closure",
    "Timed out",
    "timed out",
)
_SHARED_GPU = "Duplicate GPU"


class CollectiveError(Enum):
    """What is behind the exception of a collective."""

    LOST_RANK = "another rank is gone or silent"
    SHARED_GPU = "two ranks of a host are on one GPU"


def classify(error: BaseException) -> CollectiveError | None:
    """What a collective's exception means; None for our own errors, and for what did not come from a collective."""
    if not isinstance(error, RuntimeError) or isinstance(error, TrainingError | LostRankError):
        return None
    text = str(error)
    if _SHARED_GPU in text:
        return CollectiveError.SHARED_GPU
    return CollectiveError.LOST_RANK if any(word in text for word in _LOST_RANK) else None
