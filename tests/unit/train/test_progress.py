"""Counters and sums of a run, and their state."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from bert_fast.report.schema import EvaluationLine
from bert_fast.train.progress import Progress


def test_progress_sums_means_and_state(tmp_path: Path) -> None:
    progress = Progress()
    for value in (1.0, np.float64(2.0), 6):
        progress.add("imbalance", value)
        progress.step += 1
    assert progress.mean("imbalance") == 3.0
    assert progress.mean("never added") == 0.0
    assert Progress().mean("imbalance") == 0.0
    assert all(type(value) is float for value in progress.sums.values())
    progress.evaluations.append(
        EvaluationLine(step=3, samples=24, time_s=1.5, accuracy=0.25, mlm_loss=6.0, nsp_accuracy=0.5, nsp_loss=0.7)
    )
    progress.first_step_s = 0.5
    torch.save(progress.state_dict(), tmp_path / "p.pt")
    other = Progress()
    other.load_state_dict(torch.load(tmp_path / "p.pt", weights_only=True))
    assert other == progress
