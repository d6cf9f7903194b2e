"""Steps without a run: a rank's environment on the CPU, and the inputs of the steps that a config plans over its store."""

from __future__ import annotations

import torch

from bert_fast.balance.planner import Plan
from bert_fast.config import Config
from bert_fast.data.store import Store
from bert_fast.train.batches import PlannedStep, plan_step, step_input
from bert_fast.train.components import TrainComponents
from bert_fast.train.environment import Environment
from bert_fast.train.setup.cost_model import make_planner
from bert_fast.train.step import StepInput

CPU = torch.device("cpu")


def cpu_rank(rank: int = 0, world_size: int = 1) -> Environment:
    """A rank on the CPU in fp32."""
    return Environment(rank, rank, world_size, CPU, torch.float32)


class PlannedSteps:
    """A rank's steps as the config plans them over its training store."""

    def __init__(self, config: Config, rank: int = 0) -> None:
        self._config, self._rank = config, rank
        self._store = Store(config.data.train)
        self._planner = make_planner(config, self._store.lengths)

    def plan(self, number: int) -> Plan:
        return self._planner.plan(number)

    def planned(self, number: int) -> PlannedStep:
        return plan_step(self._store, self.plan(number), self._rank, self._config)

    def input(self, number: int) -> StepInput:
        return step_input(self.planned(number), self._config, CPU)


def weights_of(components: TrainComponents) -> torch.Tensor:
    """All weights, one flat tensor, copied."""
    return torch.cat([p.detach().ravel() for p in components.model.parameters()]).clone()
