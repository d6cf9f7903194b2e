"""Training steps that differ in engine, buckets, clipping, format and optimizer, over the model that waits."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from bert_fast.communication.buckets import measure_ready_order, plan_layout
from bert_fast.communication.ddp import DdpEngine
from bert_fast.communication.plan import Link, exact_plan, uniform_ends
from bert_fast.communication.plan_sharded import ShardedTimes, sharded_plan
from bert_fast.communication.reducer import BucketReducer
from bert_fast.communication.sharded import ShardedReducer
from bert_fast.communication.wire_format import WireFormat, wire_format
from bert_fast.config import OptimizerConfig
from bert_fast.model.objective import MlmNsp
from bert_fast.train.environment import Environment
from bert_fast.train.rank_optimizer import RankOptimizer
from bert_fast.train.setup.bucket_sizes import measure_need_times, measure_ready_times
from bert_fast.train.step import StepInput, TrainStep

from .waiting import UPDATE_SHARE, Unit, WaitingModel, slow_updates


@dataclass(frozen=True)
class Variant:
    """An engine and its settings; `buckets` as communication.bucket_mb, or `default` for DDP's own."""

    engine: str = "bucketed"
    buckets: Any = 25.0
    clip: str = "bucket_before_reduce"
    wire: str = "fp32"
    step_per_bucket: bool = False
    shard: bool = False


VARIANTS = {
    "one_bucket": Variant(buckets=1e6),
    "ddp_default": Variant("ddp", "default", "none"),
    "ddp_plan": Variant("ddp", "auto"),
    "25mib": Variant(),
    "auto": Variant(buckets="auto"),
    "auto_shadow": Variant(buckets="auto", step_per_bucket=True),
    "auto_sharded": Variant(buckets="auto", shard=True),
    "auto_sharded_shadow": Variant(buckets="auto", shard=True, step_per_bucket=True),
    "auto_bf16": Variant(buckets="auto", wire="bf16"),
    "auto_clip_none": Variant(buckets="auto", clip="none"),
    "auto_clip_global_before": Variant(buckets="auto", clip="global_before_reduce"),
    "auto_clip_global_after": Variant(buckets="auto", clip="global_after_reduce"),
}


class _Done:
    """A collective that has ended."""

    def wait(self) -> None: ...


class SilentWire(WireFormat):
    """Nothing travels; notes when each bucket would have left. Everything else of the step is done."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__(dtype)
        self.left: list[float] = []

    def all_reduce(self, number: int, wire: torch.Tensor, values: torch.Tensor, group: Any) -> Iterator[Any]:
        self.left.append(time.perf_counter())
        yield _Done()
        self.decode(wire, values)

    def reduce_scatter(self, number: int, wire: torch.Tensor, shard: torch.Tensor, group: Any) -> Iterator[Any]:
        self.left.append(time.perf_counter())
        yield _Done()


@dataclass
class Links:
    """Measured costs of the collectives, by the bytes of a whole bucket in fp32."""

    all_reduce: Link
    reduce_scatter: Link
    all_gather: Link


@dataclass
class Instance:
    """A variant that runs. `cycle` is a whole step: forward, backward, reduction, update."""

    variant: Variant
    cycle: Callable[[], None]
    step: TrainStep | None
    numel: list[int]  # of each bucket
    wait_pending: Callable[[], None] = lambda: None
    wire: WireFormat | None = None
    engine: Any = None
    model: WaitingModel | None = None


@dataclass
class Passes:
    """Measured times of the passes, as `bucket_mb: auto` measures them: [units] in ready order, the latest rank's."""

    ready_s: np.ndarray
    needed_s: np.ndarray


def measure_passes(units: list[Unit], cpu: Environment) -> Passes:
    """A collective."""
    model = WaitingModel(units)
    x = torch.zeros(1, requires_grad=True)
    ready = measure_ready_times(list(model.parameters()), lambda: model(x).mlm_sum, cpu)
    shared = torch.tensor(np.stack([ready, measure_need_times(model, lambda: model(x).mlm_sum, cpu)]))
    dist.all_reduce(shared, op=dist.ReduceOp.MAX)
    ready, needed = shared.numpy()[:, ::-1]
    return Passes(np.maximum.accumulate(ready), needed)


def plan_ends(variant: Variant, units: list[Unit], links: Links, scale: float, passes: Passes) -> list[int]:
    """After how many units, in ready order, the buckets of a variant end. A collective."""
    sizes = np.array([unit.numel * 4.0 for unit in units[::-1]])
    if variant.buckets == "default":  # DDP's first bucket is of 1 MiB
        first = uniform_ends(sizes, scale * 2**20)[0]
        return [first, *(first + end for end in uniform_ends(sizes[first:], scale * 25 * 2**20))]
    if variant.buckets != "auto":
        return uniform_ends(sizes, scale * variant.buckets * 2**20)
    if variant.shard:
        times = ShardedTimes(passes.ready_s, passes.needed_s, sizes, sizes, links.reduce_scatter, links.all_gather)
        ends = sharded_plan(times)
    else:
        width = 0.5 if variant.wire == "bf16" else 1.0
        ends = exact_plan(passes.ready_s, sizes * width, links.all_reduce).ends
    return shared_ends(ends, len(units))


def shared_ends(ends: Sequence[int], most: int) -> list[int]:
    """Rank 0's plan, of at most so many buckets, on all ranks. A collective."""
    chosen = torch.tensor([*ends, *[0] * (most - len(ends))])
    dist.broadcast(chosen, 0)
    return [end for end in chosen.tolist() if end]


def make(variant: Variant, units: list[Unit], ends: list[int], silent: bool = False) -> Instance:
    """Build a variant; `silent` replaces its collectives by nothing."""
    model = WaitingModel(units)
    parameters = list(model.parameters())
    edges = [0, *ends]
    numel = [sum(unit.numel for unit in units[::-1][a:b]) for a, b in pairwise(edges)]
    caps = [n * 4 / 2**20 for n in numel]
    x = torch.zeros(1, requires_grad=True)
    update_s = UPDATE_SHARE * sum(unit.backward_s for unit in units)
    world = dist.get_world_size()
    if variant.buckets == "default" and not silent:
        return _plain_ddp(model, caps, numel, x, update_s, variant)
    order = measure_ready_order(parameters, lambda: model(x).mlm_sum.backward())
    layout = plan_layout(
        [name for name, _ in model.named_parameters()],
        [p.numel() for p in parameters],
        order,
        clip_groups="layer",
        bucket_mb=caps,
        whole_groups=variant.clip == "bucket_before_reduce",
        shards=world if variant.shard else 1,
    )
    assert len(layout.buckets) == len(ends)
    for parameter in parameters:
        parameter.grad = None
    wire = SilentWire(torch.float32) if silent else wire_format(variant.wire, torch.float32)
    if silent and variant.wire == "bf16":
        wire = SilentWire(torch.bfloat16)
    kind: Any = DdpEngine if variant.engine == "ddp" and not silent else BucketReducer
    engine = (ShardedReducer if variant.shard else kind)(model, layout, clip=variant.clip, max_norm=1.0, wire=wire)
    if silent and isinstance(engine, ShardedReducer):
        engine.gather_weights = lambda: None  # type: ignore[method-assign]
        engine._norm = lambda: torch.linalg.vector_norm(engine.reduced(0))  # type: ignore[method-assign]
    of_rank = RankOptimizer(engine, list(model.named_parameters()), OptimizerConfig(name="adamw", lr=1e-3))
    slow_updates(of_rank.optimizer, sum(unit.numel for unit in units), update_s)
    step = TrainStep(
        engine,
        of_rank.optimizer,
        MlmNsp(),
        device=torch.device("cpu"),
        dtype=torch.float32,
        world_size=world,
        loss_scale=None,
        parameters_by_bucket=of_rank.parameters_by_bucket if variant.step_per_bucket else None,
    )
    inputs = StepInput([x], 1, 1)  # type: ignore[list-item]

    def cycle() -> None:
        step(inputs, 1e-3)

    return Instance(variant, cycle, step, numel, engine.wait_pending, wire, engine, model)


def _plain_ddp(
    model: WaitingModel, caps: list[float], numel: list[int], x: torch.Tensor, update_s: float, variant: Variant
) -> Instance:
    """As a user has it: no clipping, no hook. Its buckets are the default ones of a model of BERT's size."""
    ddp = DistributedDataParallel(
        model,
        gradient_as_bucket_view=True,
        bucket_cap_mb_list=caps,  # type: ignore[arg-type]  # says int, but takes fractions of a MiB
    )
    optimizer = torch.optim.AdamW(list(model.parameters()), lr=1e-3, fused=True)
    slow_updates(optimizer, sum(numel), update_s)

    def cycle() -> None:
        optimizer.zero_grad(set_to_none=False)
        ddp(x).mlm_sum.backward()
        optimizer.step()

    return Instance(variant, cycle, None, numel, model=model)


def without_engine(units: list[Unit], as_matrices: bool = False) -> tuple[Callable[[], None], list[float]]:
    """Forward, backward and update of one rank alone, and where its times of backward go."""
    model = WaitingModel(units, as_matrices)
    x = torch.zeros(1, requires_grad=True)
    optimizer = torch.optim.AdamW(list(model.parameters()), lr=1e-3, fused=True)
    slow_updates(optimizer, sum(unit.numel for unit in units), UPDATE_SHARE * sum(unit.backward_s for unit in units))
    backward: list[float] = []

    def cycle() -> None:
        optimizer.zero_grad(set_to_none=False)
        loss = model(x).mlm_sum
        start = time.perf_counter()
        loss.backward()
        backward.append(time.perf_counter() - start)
        optimizer.step()

    return cycle, backward
