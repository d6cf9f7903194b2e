"""Steps of the tiny task on several ranks, without a run around them: what tests of engines and optimizers compare."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from bert_fast.balance.cost import CostModel
from bert_fast.config import Config
from bert_fast.config.load import config_from_tree
from bert_fast.train.checkpoint.resume import load_checkpoint, resume_key
from bert_fast.train.checkpoint.snapshot import rank_name
from bert_fast.train.checkpoint.storage import as_bytes, write_checkpoint
from bert_fast.train.checkpoint.train_state import TrainState
from bert_fast.train.clock import Clock
from bert_fast.train.setup.build import build
from bert_fast.train.step import StepResult
from support.steps import PlannedSteps, cpu_rank, weights_of
from support.tiny_task import config_over

STEPS = 4


def make_config(store: Path, world: int, **changes: dict[str, Any]) -> Config:
    """The tiny config on `world` ranks, with `changes` to its sections."""
    tree = config_over(store)
    tree["system"]["world_size"] = world
    tree["batch"] = {"global_batch_size": 16, "micro_batch_size": 16 // world}
    for section, values in changes.items():
        tree[section] = tree.get(section, {}) | values
    return config_from_tree(tree)


class TinyTraining:
    """The components of a config on one rank, and its steps over the tiny store."""

    def __init__(self, rank: int, world: int, config: Config) -> None:
        self.config, self.environment = config, cpu_rank(rank, world)
        self.components = build(config, self.environment)
        self._steps = PlannedSteps(config, rank)
        self._poisoned = False
        if rank == 1:
            self.components.model.embeddings.word.weight.register_hook(self._poison)

    def step(self, number: int, poisoned: bool = False) -> StepResult:
        """Step `number` of the config's plan; where it is poisoned, rank 1 has a NaN in the gradient that is ready last."""
        self._poisoned = poisoned
        result = self.components.step(self._steps.input(number), lr=0.01)
        if self.components.average is not None:  # as the loop does
            self.components.average.after_step(number + 1, result.is_finite)
        return result

    def weights(self) -> np.ndarray:
        """All weights as of now, those on the wire waited for, float32 [weights]."""
        self.components.engine.wait_pending()
        return weights_of(self.components).numpy()

    def evaluated(self) -> np.ndarray:
        """The weights that are evaluated, float32 [weights]. A collective where sharded."""
        with self.components.evaluated_weights():
            return self.weights()

    def save(self, folder: Path, step: int) -> None:
        """Write a checkpoint of what there is now. A collective."""
        state, rank, world = self._state(), self.environment.rank, self.environment.world_size
        state.progress.step = step
        own = as_bytes(rank_name(rank), state.rank_state())
        group = dist.group.WORLD if world > 1 else None
        write_checkpoint(folder, [*state.slices(), own], state.describe(self._key()), rank, 2, group)

    def load(self, path: Path) -> None:
        """Take up a checkpoint."""
        load_checkpoint(path, self._key(), self._state(), self.config.train.seed, print)

    def _state(self) -> TrainState:
        return TrainState(self.components, self.environment, Clock(), CostModel(1.0, 0.0), "a test")

    def _key(self) -> dict[str, Any]:
        return resume_key(self.config, "a" * 64, "b" * 64)

    def _poison(self, gradient: torch.Tensor) -> torch.Tensor:
        return gradient.index_fill(0, torch.tensor([7]), math.nan) if self._poisoned else gradient


def train(rank: int, world: int, config: Config, poison_step: int | None = None) -> dict[str, Any]:
    """Weights, norms and finiteness of every step; for a rank pool."""
    task = TinyTraining(rank, world, config)
    weights, norms, finite = [], [], []
    for number in range(STEPS):
        result = task.step(number, number == poison_step)
        weights.append(task.weights())
        norms.append(result.grad_norm.item())
        finite.append(bool(result.is_finite))
    held = sum(entry["exp_avg"].numel() for entry in task.components.optimizer.optimizer.state.values())
    return {
        "weights": np.stack(weights), "norms": norms, "finite": finite, "held": held,
        "bytes": task.components.engine.wire.bytes_sent,
    }  # fmt: skip
