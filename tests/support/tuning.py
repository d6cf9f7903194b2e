"""A small study of a search, and runs of it that are made up: a curve that the learning rate decides."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import yaml

from bert_fast.config import Config
from support.paths import ROOT
from tuning.outcome import CurvePoint, Outcome
from tuning.search import Search, Task
from tuning.study_file import Study, read_study
from tuning.trial import DivergedError, Watch

TARGET, CAP = 0.3, 6400
SPACE = {
    "optimizer.lr": {"low": 1e-4, "high": 1e-1, "log": True},
    "optimizer.beta1": {"choices": [0.8, 0.9]},
    "schedule.warmup_steps": {"low": 1, "high": 50, "int": True},
}
MINI = str(ROOT / "configs/mini_cpu.yaml")
ONE_RANK = {"system.world_size": 1, "batch.micro_batch_size": 64}


def study_tree(**changes: Any) -> dict[str, Any]:
    """Two contestants with the same space, one batch, 4 trials each."""
    return {
        "name": "small", "base": MINI, "set": ONE_RANK, "target": TARGET, "cap_samples": CAP, "trials": 4,
        "sampler": {"seed": 7, "startup": 3}, "trial_seeds": [11, 12, 13],
        "contestants": {name: {"set": {"optimizer.name": name}, "space": SPACE} for name in ("adamw", "lamb")},
        "batches": {64: {}},
    } | changes  # fmt: skip


def write_study(folder: Path, **changes: Any) -> Path:
    """The file of `study_tree`."""
    path = folder / "study.yaml"
    path.write_text(yaml.safe_dump(study_tree(**changes), sort_keys=False), encoding="utf-8")
    return path


def make_study(folder: Path, **changes: Any) -> Study:
    """The same, read."""
    return read_study(write_study(folder, **changes))


def outcome_of(accuracies: Sequence[float], pruned: bool = False) -> Outcome:
    """A run with an evaluation each 1,600 samples."""
    curve = [CurvePoint(1600 * n, float(n), accuracy) for n, accuracy in enumerate(accuracies, 1)]
    samples = 1600 * len(curve)
    return Outcome(curve, samples // 64, samples, float(len(curve)), step_ms=10.0, optimizer_ms=1.0, pruned=pruned)


def accuracies_of(config: Config) -> list[float]:
    """Better the nearer the learning rate is to 3e-3, and always a bit better at each evaluation."""
    best = 0.32 - 0.08 * abs(math.log10(config.optimizer.lr / 3e-3))
    return [best * n / 4 for n in range(1, 5)]


def made_up(config: Config, watch: Watch) -> Outcome:
    """A `Run` that computes nothing."""
    seen: list[float] = []
    for accuracy, point in zip(accuracies_of(config), outcome_of(accuracies_of(config)).curve, strict=True):
        seen.append(accuracy)
        if watch(point):
            return outcome_of(seen, pruned=True)
    return outcome_of(seen)


def diverges(config: Config, watch: Watch) -> Outcome:
    """A `Run` whose loss is not finite after one evaluation."""
    watch(CurvePoint(1600, 1.0, 0.31))
    raise DivergedError("the loss is not finite at step 30", outcome_of([0.31]))


def next_task(search: Search) -> Task:
    """The next trial, which must be there."""
    task = search.next_task()
    assert task is not None
    return task


def compute(search: Search, run: Callable[[Config, Watch], Outcome] = made_up, at_most: int = 1000) -> list[Task]:
    """Compute trials as one worker does. Returns them in order."""
    done: list[Task] = []
    with search.alive():
        while len(done) < at_most and (task := search.next_task()) is not None:
            done.append(task)
            search.finish(task, run(task.cell.config(task.point, task.seed), search.watcher(task)), None)
    return done
