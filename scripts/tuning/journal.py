"""Names in the journal of a search: its file, and what its trials are noted with. Without optuna."""

from __future__ import annotations

JOURNAL = "journal.log"

# Attributes of a trial
SEED, OUTCOME, ERROR, PROCESSOR, WORKER, LOST = "seed", "outcome", "error", "processor", "worker", "lost"
PLACE = "place"  # of a trial that is tried again: the n of the one that was lost
