"""MLPerf's rules for BERT as code."""

from __future__ import annotations

RULESET = "5.0.0"  # BERT's last: later rulesets no longer admit it
TARGET_ACCURACY = 0.720


def evaluation_interval(global_batch: int) -> int:
    """Samples between evaluations in the closed division: floor(0.05 (230.23 GBS + 3,000,000) / 25,000) 25,000."""
    return int(0.05 * (230.23 * global_batch + 3_000_000) // 25_000) * 25_000
