"""Drawn models against one process: tied and unused weights, rank-dependent order of backward, any buckets, both engines."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from support.rank_pool import RankPool
from test_engines import Gradients, averaged, clipped, global_norm
from torch import nn

from bert_fast.communication.buckets import measure_ready_order, plan_layout
from bert_fast.communication.ddp import DdpEngine
from bert_fast.communication.reducer import BucketReducer
from bert_fast.communication.wire_format import wire_format
from bert_fast.config.choices import CLIP_MODES

pytestmark = pytest.mark.distributed

Pools = Callable[[int], RankPool]
WIDTH = 6


class Drawn(nn.Module):
    """A model drawn from a seed: layers of different sizes, of which some are used twice and some may never be.

    `route` permutes the layers. They are summed, so that another route computes the same function and its backward
    finishes gradients in another order.
    """

    def __init__(self, seed: int, with_unused: bool, dtype: torch.dtype) -> None:
        super().__init__()
        draw = random.Random(seed)
        torch.manual_seed(seed)
        self.embeddings = nn.Embedding(9, WIDTH)
        widths = [draw.randint(1, 12) for _ in range(draw.randint(2, 5))]
        self.layers = nn.ModuleList(
            nn.Sequential(nn.Linear(WIDTH, width), nn.Tanh(), nn.Linear(width, WIDTH)) for width in widths
        )
        self.again = [i for i in range(len(widths)) if draw.random() < 0.4]  # applied twice: two gradients are summed
        if with_unused:
            self.spare = nn.Linear(5, 3)
            self.layers.append(nn.Linear(2, 2))  # registered between used ones and never called
        self.heads = nn.Linear(WIDTH, WIDTH)
        self.num_used = len(widths)
        self.to(dtype)

    def forward(self, tokens: torch.Tensor, route: list[int]) -> torch.Tensor:
        hidden = self.embeddings(tokens)
        total = hidden
        for index in route:
            out = self.layers[index](hidden)
            total = total + (self.layers[index](torch.sin(out)) if index in self.again else out)
        return (self.heads(torch.tanh(total)) @ self.embeddings.weight.T).square().mean()


@dataclass(frozen=True)
class Case:
    """One step of a drawn model."""

    seed: int
    engine: str = "bucketed"
    clip: str = "none"
    clip_groups: Any = "layer"
    buckets: Any = None  # None: drawn
    wire: str = "fp32"
    dtype: torch.dtype = torch.float64
    accumulation: int = 1
    scale: float | None = None
    max_norm: float = 0.5
    with_unused: bool = True
    routes: bool = True  # whether the order of backward differs between ranks and micro-batches
    size: float = 1.0  # of the loss
    poison: str | None = None  # the parameter of which rank 1 has a NaN gradient

    def bucket_mb(self) -> Any:
        draw = random.Random(self.seed + 1)
        drawn = [draw.choice([1e-9, 2e-4, 5e-4, 1e-3]) for _ in range(draw.randint(2, 6))]
        if isinstance(self.buckets, (float, list)):
            return self.buckets
        return {"one": 25.0, "every": 1e-9, None: drawn}[self.buckets]


def loss_of(model: nn.Module, case: Case, rank: int, micro: int, num_used: int) -> torch.Tensor:
    route = list(range(num_used))
    if case.routes:
        random.Random(f"{case.seed} {rank} {micro}").shuffle(route)
    tokens = torch.from_numpy(np.random.default_rng([case.seed, rank, micro]).integers(0, 9, 4 + rank + micro))
    return case.size * (0.1 + rank) * model(tokens, route)


# ---- what a rank does -----------------------------------------------------------------------------------------------


def make_engine(model: Drawn, case: Case) -> BucketReducer | DdpEngine:
    """As `build` does: every rank lays out by rank 0's ready order."""
    named = list(model.named_parameters())
    order = measure_ready_order([p for _, p in named], lambda: loss_of(model, case, 0, 0, model.num_used).backward())
    model.zero_grad(set_to_none=True)
    shared = torch.tensor(order)
    dist.broadcast(shared, 0)
    layout = plan_layout(
        [name for name, _ in named], [p.numel() for _, p in named], shared.tolist(), clip_groups=case.clip_groups,
        bucket_mb=case.bucket_mb(), whole_groups=case.clip == "bucket_before_reduce",
    )  # fmt: skip
    kind = DdpEngine if case.engine == "ddp" else BucketReducer
    return kind(model, layout, clip=case.clip, max_norm=case.max_norm, wire=wire_format(case.wire, case.dtype))


def step_of(rank: int, world: int, case: Case) -> dict[str, Any]:
    """The last of a few equal steps of an engine."""
    model = Drawn(case.seed, case.with_unused, case.dtype)
    engine = make_engine(model, case)
    started = []
    real = dist.all_reduce

    def noting(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        started.append(tensor.numel())
        return real(tensor, *args, **kwargs)

    if case.poison is not None and rank == 1:
        model.get_parameter(case.poison).register_hook(lambda gradient: gradient * math.nan)
    scale = None if case.scale is None else torch.tensor(case.scale, dtype=case.dtype)
    dist.all_reduce = noting
    try:
        for _ in range(1 + DdpEngine.num_warmup_steps):
            started.clear()
            engine.zero_grad()
            for micro in range(case.accumulation):
                with engine.micro_batch(micro == case.accumulation - 1, scale):
                    loss = loss_of(engine.module, case, rank, micro, model.num_used)
                    (loss if scale is None else loss * scale).backward()
            norm = engine.finish()
    finally:
        dist.all_reduce = real
    return {
        "gradients": {name: p.grad.numpy().copy() for name, p in model.named_parameters()}, "norm": norm.item(),
        "started": list(started), "spans": [bucket.end - bucket.start for bucket in engine.layout.buckets],
        "own_order": measure_ready_order(
            list(model.parameters()), lambda: loss_of(model, case, rank, 0, model.num_used).backward()
        ) if case.engine == "bucketed" else None,
    }  # fmt: skip


# ---- the oracle -----------------------------------------------------------------------------------------------------


def local_gradients(case: Case, rank: int) -> Gradients:
    """A rank's gradient in fp64 by autograd, before any clipping."""
    model = Drawn(case.seed, case.with_unused, torch.float64)
    for micro in range(case.accumulation):
        loss_of(model, case, rank, micro, model.num_used).backward()
    return {name: torch.zeros_like(p) if p.grad is None else p.grad for name, p in model.named_parameters()}


def group_of(name: str, scheme: str) -> str:
    parts = name.split(".")
    return {"layer": ".".join(parts[:2]) if parts[0] == "layers" else parts[0], "tensor": name, "model": ""}[scheme]


def oracle(case: Case, world: int) -> Gradients:
    per_rank = [local_gradients(case, rank) for rank in range(world)]
    if case.clip == "global_before_reduce":
        per_rank = [clipped(gradients, case.max_norm) for gradients in per_rank]
    if case.clip == "bucket_before_reduce":
        names: dict[str, list[str]] = {}
        for name in per_rank[0]:
            names.setdefault(group_of(name, case.clip_groups), []).append(name)
        limit = case.max_norm / math.sqrt(len(names))
        per_rank = [
            {k: v for members in names.values() for k, v in clipped({n: g[n] for n in members}, limit).items()}
            for g in per_rank
        ]
    mean = averaged(per_rank)
    return clipped(mean, case.max_norm) if case.clip == "global_after_reduce" else mean


def assert_gradients(results: list[dict[str, Any]], expected: Gradients, tolerance: float, note: str = "") -> None:
    largest = max(float(g.abs().max()) for g in expected.values())
    for rank, result in enumerate(results):
        assert result["gradients"].keys() == expected.keys()
        for name, gradient in result["gradients"].items():
            np.testing.assert_allclose(
                gradient, expected[name].numpy(), rtol=0, atol=tolerance * largest, err_msg=f"{note} rank {rank} {name}"
            )
            np.testing.assert_array_equal(gradient, results[0]["gradients"][name], f"{note} rank {rank} is not rank 0")


# ---- the tests ------------------------------------------------------------------------------------------------------

MODELS = {1: (0, 1), 3: (2, 3)}  # by accumulation
SEEDS = [seed for seeds in MODELS.values() for seed in seeds]


@pytest.mark.parametrize("accumulation", [1, 3])
@pytest.mark.parametrize("clip", CLIP_MODES)
@pytest.mark.parametrize("world", [1, 2, 4])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)], ids=["fp64", "fp32"])
def test_reducer_equals_one_process(
    pool: Pools, dtype: torch.dtype, tolerance: float, world: int, clip: str, accumulation: int
) -> None:
    for seed in MODELS[accumulation]:
        scheme = ("layer", "tensor", "model")[seed % 3]
        case = Case(seed, clip=clip, clip_groups=scheme, dtype=dtype, accumulation=accumulation)
        expected = oracle(case, world)
        for buckets in ("one", "every", None) if dtype == torch.float64 else (None,):
            results = pool(world).call(step_of, replace(case, buckets=buckets))
            assert_gradients(results, expected, tolerance, f"seed {seed}, {buckets} buckets:")
            assert [r["started"] for r in results] == [r["spans"] for r in results], "a group of one sends too"


@pytest.mark.parametrize("accumulation", [1, 3])
@pytest.mark.parametrize("world", [1, 2, 4])
@pytest.mark.parametrize(
    ("clip", "dtype", "tolerance"),
    [
        *((clip, torch.float32, 1e-5) for clip in CLIP_MODES),
        *((clip, torch.float64, 1e-12) for clip in CLIP_MODES),
    ],
)
def test_ddp_equals_one_process(
    pool: Pools, clip: str, dtype: torch.dtype, tolerance: float, world: int, accumulation: int
) -> None:
    """Every parameter used, as DDP wants it, and one order of backward where it must hold clip groups together."""
    for seed in MODELS[accumulation]:
        case = Case(
            seed, "ddp", clip, ("layer", "tensor", "model")[seed % 3], dtype=dtype, accumulation=accumulation,
            with_unused=False, routes=clip != "bucket_before_reduce",
        )  # fmt: skip
        expected = oracle(case, world)
        for buckets in ("one", None) if seed in (0, 2) else (None,):
            results = pool(world).call(step_of, replace(case, buckets=buckets))
            assert_gradients(results, expected, tolerance, f"seed {seed}, {buckets} buckets:")


def test_the_cases_tell_modes_and_orders_apart(pool: Pools) -> None:
    """Else the tests above could not fail: modes differ, and ranks do finish gradients in different orders."""
    results = [oracle(Case(0, clip=mode), 2) for mode in CLIP_MODES]
    for number, one in enumerate(results):
        for other in results[:number]:
            assert max(float((one[name] - other[name]).abs().max()) for name in one) > 1e-3
    norms = [global_norm(local_gradients(Case(seed), rank)) for seed in SEEDS for rank in range(4)]
    assert min(norms) < Case(0).max_norm < max(norms)
    orders = [pool(2).call(step_of, Case(seed)) for seed in SEEDS]
    assert sum(zero["own_order"] != one["own_order"] for zero, one in orders) >= 3
    assert any(Drawn(seed, False, torch.float64).again for seed in SEEDS)
    assert any(float(g.abs().max()) == 0 for g in oracle(Case(0), 2).values()), "an unused parameter"


@pytest.mark.parametrize("scale", [None, 65536.0])
@pytest.mark.parametrize("clip", CLIP_MODES)
def test_buckets_do_not_change_a_bit_over_ranks(pool: Pools, clip: str, scale: float | None) -> None:
    """Two addends commute, so that not even the order of additions can differ."""
    case = Case(4, clip=clip, dtype=torch.float32, scale=scale, accumulation=2)
    plans = ("one", "every", None, 3e-4, [1e-9, 1e-9, 25.0])
    results = [pool(2).call(step_of, replace(case, buckets=plan)) for plan in plans]
    assert len({len(ranks[0]["spans"]) for ranks in results}) > 2
    for ranks in results:
        assert_gradients(ranks, {n: torch.from_numpy(g) for n, g in results[0][0]["gradients"].items()}, 0.0)
        assert ranks[0]["norm"] == ranks[1]["norm"] == results[0][0]["norm"]


@pytest.mark.parametrize("clip", CLIP_MODES)
@pytest.mark.parametrize("engine", ["bucketed", "ddp"])
def test_a_loss_scale_carries_small_gradients_over_an_fp16_wire(pool: Pools, engine: str, clip: str) -> None:
    """Entries of 1e-8, below fp16's smallest, equal the unscaled oracle to fp16's precision; without the scale they do not."""
    case = Case(
        3, engine, clip, dtype=torch.float32, wire="fp16", accumulation=3, size=3e-7, max_norm=1.5e-7, with_unused=False,
        routes=False,
    )  # fmt: skip
    expected = oracle(case, 2)
    largest = max(float(g.abs().max()) for g in expected.values())
    assert largest < 2**-20
    results = pool(2).call(step_of, replace(case, scale=2.0**26))
    assert_gradients(results, expected, 2**-10)
    unscaled = pool(2).call(step_of, case)
    gap = max(np.abs(unscaled[0]["gradients"][n] - expected[n].numpy()).max() for n in expected)
    assert gap > 2**-7 * largest


@pytest.mark.parametrize("scale", [None, 65536.0])
@pytest.mark.parametrize("wire", ["fp32", "fp16"])
@pytest.mark.parametrize("buckets", ["one", "every"])
def test_nan_in_one_group_of_one_rank_is_seen_by_all(pool: Pools, buckets: str, wire: str, scale: float | None) -> None:
    """That group is NaN on every rank, and every other one is what it would have been."""
    case = Case(2, clip="bucket_before_reduce", buckets=buckets, dtype=torch.float32, wire=wire, scale=scale)
    bad, expected = "layers.0.2.weight", oracle(case, 2)
    results = pool(2).call(step_of, replace(case, poison=bad))
    largest = max(float(g.abs().max()) for g in expected.values())
    for result in results:
        assert not math.isfinite(result["norm"])
        for name, gradient in result["gradients"].items():
            if group_of(name, "layer") == "layers.0":
                assert np.isnan(gradient).all(), name
            else:
                tolerance = 1e-5 if wire == "fp32" else 2**-10
                np.testing.assert_allclose(gradient, expected[name].numpy(), rtol=0, atol=tolerance * largest)


@pytest.mark.parametrize("clip", [mode for mode in CLIP_MODES if mode != "bucket_before_reduce"])
@pytest.mark.parametrize("engine", ["bucketed", "ddp"])
def test_nan_of_one_rank_under_a_loss_scale(pool: Pools, engine: str, clip: str) -> None:
    case = Case(2, engine, clip, dtype=torch.float32, with_unused=False, routes=False, scale=1024.0, accumulation=3)
    for result in pool(2).call(step_of, replace(case, poison="heads.bias")):
        assert not math.isfinite(result["norm"])
        assert np.isnan(result["gradients"]["heads.bias"]).all()
