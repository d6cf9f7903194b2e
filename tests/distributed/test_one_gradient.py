"""Accumulation x ranks x strategy give one gradient: only the global batch counts, not who computes which part of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from support.rank_pool import RankPool
from support.steps import CPU, PlannedSteps
from support.tiny_task import config_over

from bert_fast.communication.buckets import measure_ready_order
from bert_fast.communication.ddp import DdpEngine
from bert_fast.communication.reducer import BucketReducer
from bert_fast.communication.wire_format import wire_format
from bert_fast.config import Config
from bert_fast.config.choices import STRATEGIES
from bert_fast.config.load import config_from_tree
from bert_fast.data.store import Store
from bert_fast.model.bert import BertForPretraining
from bert_fast.model.objective import MlmNsp
from bert_fast.optim.build import build_optimizer
from bert_fast.train.setup.build import make_layout
from bert_fast.train.setup.cost_model import make_planner
from bert_fast.train.step import TrainStep

pytestmark = pytest.mark.distributed

Pools = Callable[[int], RankPool]

GLOBAL_BATCH_SIZE = 8
STEP = 3  # of the plan; any would do


@dataclass(frozen=True)
class Way:
    """How the global batch is split up."""

    ranks: int
    accumulation: int = 1
    strategy: str = "balanced"
    engine: str = "bucketed"

    def config(self, store: Path, clip: str) -> Config:
        tree = config_over(store)
        local = GLOBAL_BATCH_SIZE // self.ranks // self.accumulation
        tree["model"] |= {"hidden_dropout": 0.0, "attention_dropout": 0.0}
        tree["batch"] = {
            "global_batch_size": GLOBAL_BATCH_SIZE,
            "micro_batch_size": local,
            "gradient_accumulation_steps": self.accumulation,
        }
        own = {"stratified_presort": {"num_strata": 2}, "packed": {"max_samples_per_pack": 4}}
        tree["balance"] = {"strategy": self.strategy, **own.get(self.strategy, {})}
        tree["communication"] |= {"engine": self.engine, "clip": clip} | ({} if clip == "none" else {"max_norm": 0.5})
        tree["train"]["max_steps"] = 1000
        tree["system"]["world_size"] = self.ranks
        return config_from_tree(tree)


def step_of(rank: int, world: int, config: Config, dtype: torch.dtype) -> dict[str, Any]:
    """One training step on this rank's share of step number STEP: its gradient, norm and loss sums."""
    torch.manual_seed(0)
    model = BertForPretraining(config.model, "matmul").to(dtype)
    steps = PlannedSteps(config, rank)
    inputs = steps.input(STEP)  # what pads a micro-batch must not count either

    order = measure_ready_order(list(model.parameters()), lambda: model(inputs.micro_batches[0]).mlm_sum.backward())
    if dist.is_initialized():
        shared = torch.tensor(order)
        dist.broadcast(shared, 0)
        order = shared.tolist()
    model.zero_grad(set_to_none=True)
    communication = config.communication
    engine = (DdpEngine if communication.engine == "ddp" else BucketReducer)(
        model, make_layout(config, model, order), clip=communication.clip, max_norm=communication.max_norm,
        wire=wire_format("fp32", dtype),
    )  # fmt: skip
    optimizer = build_optimizer(model.named_parameters(), config.optimizer)
    train_step = TrainStep(
        engine, optimizer, MlmNsp(), device=CPU, dtype=torch.float32, world_size=world, loss_scale=None
    )
    for _ in range(1 + DdpEngine.num_warmup_steps * (communication.engine == "ddp")):
        result = train_step(inputs, lr=0.0)
    return {
        "ids": steps.plan(STEP).ids, "norm": result.grad_norm.item(), "sums": [result.mlm_sum.item(), result.nsp_sum.item()],
        "gradient": np.concatenate([p.grad.numpy().ravel() for p in model.parameters()]),
    }  # fmt: skip


def outcome(pool: Pools, way: Way, store: Path, clip: str, dtype: torch.dtype) -> list[dict[str, Any]]:
    """What every rank ends with."""
    config = way.config(store, clip)
    return [step_of(0, 1, config, dtype)] if way.ranks == 1 else pool(way.ranks).call(step_of, config, dtype)


WAYS = [
    Way(1, 1, "random"), Way(1, 1), Way(1, 4), Way(2, 1, "random"), Way(2, 1), Way(2, 2, "random"), Way(2, 2),
    Way(4, 1, "random"), Way(4, 1), Way(2, 1, engine="ddp"), Way(2, 2, engine="ddp"),
    *(Way(4, 1, name) for name in ("pad_to_longest", "exchange", "exchange_snake", "balanced_free", "packed")),
    *(Way(2, 2, name) for name in ("balanced_free", "packed")), Way(2, 1, "balanced_free", engine="ddp"),
]  # fmt: skip


def name_of(way: Way) -> str:
    return f"{way.ranks}x{GLOBAL_BATCH_SIZE // way.ranks // way.accumulation}x{way.accumulation}-{way.strategy}-{way.engine}"


@pytest.mark.parametrize("clip", ["none", "global_after_reduce"])
@pytest.mark.parametrize("way", WAYS[1:], ids=name_of)
def test_one_gradient(pool: Pools, tiny_store: Path, way: Way, clip: str) -> None:
    """Exact but for the order of additions: 1e-11 of the largest entry in fp64, 1e-5 where DDP wants fp32."""
    dtype, tolerance = (torch.float64, 1e-11) if way.engine == "bucketed" else (torch.float32, 1e-5)
    (reference,) = outcome(pool, WAYS[0], tiny_store, clip, torch.float64)
    assert reference["norm"] > 0.5  # the threshold: clipping bites
    ranks = outcome(pool, way, tiny_store, clip, dtype)
    np.testing.assert_array_equal(np.sort(ranks[0]["ids"].ravel()), np.sort(reference["ids"].ravel()))
    largest = np.abs(reference["gradient"]).max()
    for rank in ranks:
        np.testing.assert_allclose(rank["gradient"], reference["gradient"], rtol=0, atol=tolerance * largest)
        assert rank["norm"] == pytest.approx(reference["norm"], rel=tolerance)
    sums = np.sum([rank["sums"] for rank in ranks], axis=0)
    np.testing.assert_allclose(sums, reference["sums"], rtol=tolerance)


def plans_of(rank: int, _world: int, config: Config) -> np.ndarray:
    np.random.seed(rank)  # the planner must not look at these
    torch.manual_seed(rank)
    lengths = Store(config.data.train).lengths
    planner = make_planner(config, lengths)
    return np.stack([np.concatenate([plan.ids, plan.starts]) for plan in map(planner.plan, (0, 1, 70, 999))])


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_every_rank_plans_the_same(pool: Pools, tiny_store: Path, strategy: str) -> None:
    plans = pool(4).call(plans_of, Way(4, 2, strategy).config(tiny_store, "none"))
    assert plans[0].shape == (4, GLOBAL_BATCH_SIZE + 4 * 2 + 1)
    for plan in plans[1:]:
        np.testing.assert_array_equal(plan, plans[0])
    for step in plans[0]:
        assert len(np.unique(step[:GLOBAL_BATCH_SIZE])) == GLOBAL_BATCH_SIZE
