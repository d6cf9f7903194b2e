"""What changes in a run, as one object: a checkpoint is its `state_dict` and its tensors. No other module names their keys."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any, NamedTuple

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from bert_fast.balance.cost import CostModel
from bert_fast.errors import UserError
from bert_fast.run_folder import CHECKPOINT_MANIFEST
from bert_fast.train.checkpoint.snapshot import load_tensors, optimizer_counts, rank_state, slices_to_write
from bert_fast.train.checkpoint.storage import TensorSlice
from bert_fast.train.clock import Clock
from bert_fast.train.components import TrainComponents
from bert_fast.train.environment import Environment, seed_ranks
from bert_fast.train.progress import Progress

Number = Annotated[float, Field(allow_inf_nan=False)]
Count = Annotated[int, Field(ge=0, le=1 << 62)]


class _Saved(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class _Clock(_Saved):
    elapsed: Number
    paused: dict[str, Number]


class _LossScale(_Saved):
    value: Number
    good_steps: Number


class _OptimizerCounts(_Saved):
    scalars: dict[str, Annotated[dict[str, Number], Field(min_length=1)]]
    groups: list[dict[str, Count | Number]]


class _Evaluation(_Saved):
    step: Count  # whole numbers stay whole: the report formats them as such
    samples: Count
    time_s: Number
    accuracy: Number
    mlm_loss: float  # not finite where the run has diverged
    nsp_accuracy: Number | None
    nsp_loss: float | None
    at_10: Number | None = None  # with the contrastive objective
    mrr: Number | None = None
    alignment: float | None = None
    uniformity: float | None = None


class _Progress(_Saved):
    step: Count
    samples: Count
    tokens: Count
    tokens_squared: Count
    masked: Count
    next_evaluation: Count
    evaluations: list[_Evaluation]
    sums: dict[str, Number]
    sessions: Count
    first_step_s: Number | None
    joules: list[Number | None] = Field(default=[None, None], min_length=2, max_length=2)


class SavedState(_Saved):
    """`TrainState.state_dict` as it is read back from a file that anybody may have written."""

    progress: _Progress
    clock: _Clock
    loss_scale: _LossScale | None
    optimizer: _OptimizerCounts
    average: Count
    cost: list[Number] = Field(min_length=2, max_length=2)


class Description(NamedTuple):
    """A checkpoint's complete.json beside its files: `key` says of which run it is (resume.resume_key)."""

    step: int
    world_size: int
    key: dict[str, Any]
    state: SavedState


class TrainState:
    """Progress, clocks, cost model, and the components' weights, moments, averages, random state and loss scale.

    progress:    counters, evaluations and sums of the run
    clock:       the MLPerf clock and what is paused on the throughput clock
    cost:        the cost model that plans are made with; a resumed run keeps it, so that all its plans stay the same
    cost_source: where that is from, in words
    """

    def __init__(
        self, components: TrainComponents, environment: Environment, clock: Clock, cost: CostModel, cost_source: str
    ) -> None:
        self.components, self.environment = components, environment
        self.progress, self.clock = Progress(), clock
        self.cost, self.cost_source = cost, cost_source

    def state_dict(self) -> dict[str, Any]:
        """Everything but tensors, as plain values. A collective where the optimizer is sharded."""
        loss_scale = self.components.loss_scale
        state = {
            "progress": self.progress.state_dict(),
            "clock": self.clock.state_dict(),
            "loss_scale": loss_scale.state_dict() if loss_scale else None,
            "optimizer": optimizer_counts(self.components),
            "average": self.components.average.count if self.components.average else 0,
            "cost": [self.cost.linear, self.cost.quadratic],
        }
        plain: dict[str, Any] = json.loads(json.dumps(state, default=float))
        return plain

    def load_state_dict(self, state: SavedState) -> None:
        """Take up progress, clock, loss scale and cost model; tensors and the optimizer's counts are `load_tensors`'."""
        self.progress.load_state_dict(state.progress.model_dump())
        self.clock.load_state_dict(state.clock.model_dump())
        if self.components.loss_scale and state.loss_scale:
            self.components.loss_scale.load_state_dict(state.loss_scale.model_dump())
        saved_cost = CostModel(*state.cost)
        if saved_cost != self.cost:  # a fit cannot be repeated, and another one would plan other steps
            self.cost, self.cost_source = saved_cost, "the resumed run"

    def describe(self, key: dict[str, Any]) -> dict[str, Any]:
        """What complete.json holds beside the list of files. A collective where the optimizer is sharded."""
        return {
            "step": self.progress.step,
            "world_size": self.environment.world_size,
            "key": key,
            "state": self.state_dict(),
        }

    def slices(self) -> list[TensorSlice]:
        """Views of what this rank writes; they do not change before the next update."""
        return slices_to_write(self.components, self.environment)

    def rank_state(self) -> dict[str, Any]:
        """Copies of what this rank has of its own."""
        return rank_state(self.components, self.environment)

    def load(self, path: Path, description: Description, seed: int) -> None:
        """Take up a checkpoint, on every rank by itself.

        Where another number of ranks wrote it, random state begins anew from `seed` and the step, and what their wire
        formats had not sent is shared out.
        """
        same_ranks = description.world_size == self.environment.world_size
        if not same_ranks:
            seed_ranks(seed + description.state.progress.step, self.environment)
        saved = description.state
        counts = saved.optimizer.model_dump()
        load_tensors(path, self.components, self.environment, counts, description.world_size, saved.average)
        self.components.step.prepare_rates()
        self.load_state_dict(description.state)


def parse_description(path: Path, description: dict[str, Any]) -> Description:
    """A checkpoint's complete.json as typed values. Raises UserError naming what is wrong with it."""
    key, wrote, step = (description.get(name) for name in ("key", "world_size", "step"))
    if not isinstance(key, dict) or type(wrote) is not int or type(step) is not int:
        raise UserError(
            f"checkpoint {path} is damaged ({CHECKPOINT_MANIFEST} has no key, step and world_size of a run); remove it"
        )
    try:
        state = SavedState.model_validate(description.get("state"))
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in ("state", *first["loc"]))
        raise UserError(
            f"checkpoint {path} is damaged ({CHECKPOINT_MANIFEST}: {where}: {first['msg']}); remove it"
        ) from None
    return Description(step, wrote, key, state)
