"""Both engines against a single-process oracle: per-rank gradients by autograd, clipped as documented, averaged."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from support.rank_pool import RankPool
from torch import nn

from bert_fast.communication.buckets import measure_ready_order, plan_layout
from bert_fast.communication.ddp import DdpEngine
from bert_fast.communication.reducer import BucketReducer
from bert_fast.communication.wire_format import wire_format
from bert_fast.config.choices import CLIP_MODES

pytestmark = pytest.mark.distributed

Pools = Callable[[int], RankPool]

EVERY_TENSOR, SOME, ONE_BUCKET = 1e-5, 6e-4, 25.0  # MiB; the model below has 2.5e-3 in fp32
LAYOUTS = (EVERY_TENSOR, SOME, ONE_BUCKET, [EVERY_TENSOR, SOME])


class Toy(nn.Module):
    """BERT's names and habits in small: the embedding is used twice; one branch may go unused."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        torch.manual_seed(7)
        self.embeddings = nn.Embedding(11, 8)
        self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(3))
        self.branch = nn.Linear(8, 8)
        self.heads = nn.Linear(8, 8)
        self.to(dtype)  # drawn in fp32: the same numbers in every format

    def forward(self, tokens: torch.Tensor, use_branch: bool) -> torch.Tensor:
        hidden = self.embeddings(tokens)
        for layer in self.layers:
            hidden = torch.tanh(layer(hidden))
        if use_branch:
            hidden = hidden + self.branch(hidden)
        return (self.heads(hidden) @ self.embeddings.weight.T).square().mean()


@dataclass(frozen=True)
class Case:
    """A step: how it is clipped and carried, and what each rank computes."""

    engine: str = "bucketed"
    clip: str = "none"
    clip_groups: Any = "layer"
    bucket_mb: Any = SOME
    wire: str = "fp32"
    dtype: torch.dtype = torch.float64
    accumulation: int = 1
    scale: float | None = None
    max_norm: float = 1.0
    branch: str = "used"  # used | unused | unused on rank 1 | used first (in the first micro-batch only)
    poison: float | None = None  # rank 1's gradient of one weight


def loss_of(model: nn.Module, case: Case, rank: int, micro: int) -> torch.Tensor:
    """Ranks differ in tokens and in size of gradient, so that a threshold clips some of them only."""
    tokens = torch.from_numpy(np.random.default_rng([rank, micro]).integers(0, 11, 5 + rank))
    unused = case.branch == "unused" or (case.branch == "unused on rank 1" and rank == 1)
    return (0.2 + 2.0 * rank) * model(tokens, not (unused or (case.branch == "used first" and micro > 0)))


# ---- what a rank does -----------------------------------------------------------------------------------------------


def engine_step(rank: int, world: int, case: Case) -> dict[str, Any]:
    """Gradients by parameter name, norm and traffic of one step of an engine."""
    model = Toy(case.dtype)
    engine = make_engine(model, case)
    scale = None if case.scale is None else torch.tensor(case.scale, dtype=case.dtype)
    for step in range(1 + DdpEngine.num_warmup_steps):  # the reducer too: a second step must not see the first
        if case.poison is not None and rank == 1 and step == DdpEngine.num_warmup_steps:
            model.layers[1].weight.register_hook(lambda grad: grad.index_fill(0, torch.tensor([3]), case.poison))
        engine.wire.bytes_sent = 0
        engine.zero_grad()
        for micro in range(case.accumulation):
            last = micro == case.accumulation - 1
            now = case if step == DdpEngine.num_warmup_steps else replace(case, branch="used")
            with engine.micro_batch(last, scale):
                loss = loss_of(engine.module, now, rank, micro)
                (loss if scale is None else loss * scale).backward()
        norm = engine.finish()
    return {
        "gradients": {name: p.grad.numpy().copy() for name, p in model.named_parameters()},
        "norm": norm.item(), "bytes": engine.wire.bytes_sent, "clip": engine.clip_statistics.read(),
        "buckets": len(engine.layout.buckets),
    }  # fmt: skip


def make_engine(model: Toy, case: Case) -> BucketReducer | DdpEngine:
    named = list(model.named_parameters())
    order = measure_ready_order([p for _, p in named], lambda: loss_of(model, Case(), 0, 0).backward())
    model.zero_grad(set_to_none=True)
    layout = plan_layout(
        [name for name, _ in named], [p.numel() for _, p in named], order, clip_groups=case.clip_groups,
        bucket_mb=case.bucket_mb, whole_groups=case.clip == "bucket_before_reduce",
    )  # fmt: skip
    kind = DdpEngine if case.engine == "ddp" else BucketReducer
    return kind(model, layout, clip=case.clip, max_norm=case.max_norm, wire=wire_format(case.wire, case.dtype))


# ---- the oracle -----------------------------------------------------------------------------------------------------

Gradients = dict[str, torch.Tensor]


def local_gradients(case: Case, rank: int) -> Gradients:
    """A rank's gradient, summed over its micro-batches, before any clipping, in fp64."""
    model = Toy(torch.float64)
    sum((loss_of(model, case, rank, micro) for micro in range(case.accumulation)), torch.zeros(())).backward()
    return {name: torch.zeros_like(p) if p.grad is None else p.grad for name, p in model.named_parameters()}


def group_of(name: str, scheme: Any) -> str:
    if isinstance(scheme, dict):
        return next(group for group, pattern in scheme.items() if re.search(pattern, name))
    if scheme == "layer":
        return ".".join(name.split(".")[:2]) if name.startswith("layers") else name.split(".")[0]
    return name if scheme == "tensor" else "model"


def clipped(gradients: Gradients, threshold: float) -> Gradients:
    norm = math.sqrt(sum(float(g.square().sum()) for g in gradients.values()))
    return {name: g * min(1.0, threshold / norm) if norm else g for name, g in gradients.items()}


def averaged(per_rank: list[Gradients]) -> Gradients:
    return {name: sum(g[name] for g in per_rank) / len(per_rank) for name in per_rank[0]}


def oracle(case: Case, world: int) -> Gradients:
    """The averaged gradient after the clipping that communication/clip.py and the config document."""
    per_rank = [local_gradients(case, rank) for rank in range(world)]
    if case.clip == "global_before_reduce":
        per_rank = [clipped(g, case.max_norm) for g in per_rank]
    if case.clip == "bucket_before_reduce":
        groups = {group_of(name, case.clip_groups) for name in per_rank[0]}
        per_rank = [
            {
                name: value
                for group in groups
                for name, value in clipped(
                    {n: g for n, g in gradients.items() if group_of(n, case.clip_groups) == group},
                    case.max_norm / math.sqrt(len(groups)),
                ).items()
            }
            for gradients in per_rank
        ]
    mean = averaged(per_rank)
    return clipped(mean, case.max_norm) if case.clip == "global_after_reduce" else mean


def assert_equal_gradients(results: list[dict[str, Any]], expected: Gradients, tolerance: float) -> None:
    """Every rank's gradient is the expected one, relative to its largest entry, and all ranks' are identical."""
    largest = max(float(g.abs().max()) for g in expected.values())
    for rank, result in enumerate(results):
        for name, gradient in result["gradients"].items():
            np.testing.assert_allclose(
                gradient, expected[name].numpy(), rtol=0, atol=tolerance * largest, err_msg=f"rank {rank}, {name}"
            )
            np.testing.assert_array_equal(gradient, results[0]["gradients"][name], f"rank {rank} is not rank 0: {name}")


# ---- the tests ------------------------------------------------------------------------------------------------------

BOTH = [("bucketed", torch.float64, 1e-12), ("bucketed", torch.float32, 1e-5), ("ddp", torch.float32, 1e-5)]


@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("clip", CLIP_MODES)
@pytest.mark.parametrize(("engine", "dtype", "tolerance"), BOTH, ids=["bucketed-fp64", "bucketed-fp32", "ddp-fp32"])
@pytest.mark.parametrize("world", [2, 4])
def test_engine_equals_oracle(
    pool: Pools, world: int, engine: str, dtype: torch.dtype, tolerance: float, clip: str, accumulation: int
) -> None:
    case = Case(engine=engine, dtype=dtype, clip=clip, accumulation=accumulation)
    expected = oracle(case, world)
    for bucket_mb in LAYOUTS:
        results = pool(world).call(engine_step, replace(case, bucket_mb=bucket_mb))
        assert_equal_gradients(results, expected, tolerance)
        norm = math.sqrt(sum(float(g.square().sum()) for g in expected.values()))
        unclipped = norm if clip != "global_after_reduce" else global_norm(oracle(replace(case, clip="none"), world))
        assert [r["norm"] for r in results] == pytest.approx([unclipped] * world, rel=tolerance * 10)
        assert results[0]["buckets"] == 1 or bucket_mb != ONE_BUCKET


def global_norm(gradients: Gradients) -> float:
    return math.sqrt(sum(float(g.square().sum()) for g in gradients.values()))


@pytest.mark.parametrize("clip", [mode for mode in CLIP_MODES if mode != "none"])
def test_the_cases_above_clip(clip: str) -> None:
    """Rank 0's small gradient is under the threshold and the others' are over it, so the oracle tells modes apart."""
    norms = [global_norm(local_gradients(Case(), rank)) for rank in range(4)]
    assert norms[0] < Case().max_norm < min(norms[1:])
    for world in (2, 4):
        results = [oracle(Case(clip=mode), world) for mode in CLIP_MODES]
        mine = results[list(CLIP_MODES).index(clip)]
        gaps = [max(float((mine[n] - other[n]).abs().max()) for n in mine) for other in results]
        assert sum(gap < 1e-3 for gap in gaps) == 1  # itself


@pytest.mark.parametrize("engine", ["bucketed", "ddp"])
def test_clip_groups_are_numerics_and_buckets_are_not(pool: Pools, engine: str) -> None:
    dtype, tolerance = (torch.float32, 1e-5) if engine == "ddp" else (torch.float64, 1e-12)
    seen = []
    for groups in ("layer", "tensor", "model", {"late": "embeddings|branch", "early": "."}):
        if engine == "ddp" and isinstance(groups, dict):
            continue  # DDP fills buckets as gradients come, and those of this group do not come one after the other
        case = Case(engine=engine, dtype=dtype, clip="bucket_before_reduce", clip_groups=groups)
        expected = oracle(case, 2)
        for bucket_mb in LAYOUTS:
            assert_equal_gradients(pool(2).call(engine_step, replace(case, bucket_mb=bucket_mb)), expected, tolerance)
        seen.append(expected)
    for i, one in enumerate(seen):
        for other in seen[:i]:
            assert max(float((one[n] - other[n]).abs().max()) for n in one) > 1e-3


def test_ddp_refuses_clip_groups_that_it_cannot_hold_together(pool: Pools) -> None:
    case = Case("ddp", "bucket_before_reduce", {"late": "embeddings|branch", "early": "."}, dtype=torch.float32)
    with pytest.raises(RuntimeError, match="UserError: .*clip_groups"):
        pool(2).call(engine_step, case)


@pytest.mark.parametrize("engine", ["bucketed", "ddp"])
@pytest.mark.parametrize(("wire", "epsilon"), [("bf16", 2**-8), ("fp16", 2**-11)])
def test_half_precision_wire(pool: Pools, engine: str, wire: str, epsilon: float) -> None:
    """Off by the rounding of each rank's share and of each partial sum; half as many bytes travel."""
    case = Case(engine=engine, dtype=torch.float32, clip="bucket_before_reduce")
    full = pool(4).call(engine_step, case)
    half = pool(4).call(engine_step, replace(case, wire=wire))
    assert half[0]["bytes"] * 2 == full[0]["bytes"]
    sizes = averaged([{n: g.abs() for n, g in local_gradients(case, rank).items()} for rank in range(4)])
    gaps = []
    for name, size in sizes.items():
        gap = np.abs(half[0]["gradients"][name] - full[0]["gradients"][name])
        assert (gap <= 5 * epsilon * size.numpy() + 2**-24).all(), name
        gaps.append(gap.max())
        for other in half[1:]:
            np.testing.assert_array_equal(other["gradients"][name], half[0]["gradients"][name])
    assert max(gaps) > 0


@pytest.mark.parametrize("clip", CLIP_MODES)
@pytest.mark.parametrize("branch", ["unused", "unused on rank 1", "used first"])
def test_parameters_without_a_gradient_count_as_zero(pool: Pools, branch: str, clip: str) -> None:
    case = Case(clip=clip, branch=branch, accumulation=2)
    expected = oracle(case, 2)
    assert (float(expected["branch.weight"].abs().max()) == 0) == (branch == "unused")
    for bucket_mb in (EVERY_TENSOR, ONE_BUCKET):
        assert_equal_gradients(pool(2).call(engine_step, replace(case, bucket_mb=bucket_mb)), expected, 1e-12)


@pytest.mark.parametrize("poison", [math.nan, math.inf])
@pytest.mark.parametrize("clip", CLIP_MODES)
@pytest.mark.parametrize(("engine", "wire"), [("bucketed", "fp32"), ("bucketed", "fp16"), ("ddp", "fp32")])
def test_a_bad_gradient_of_one_rank_reaches_every_norm(
    pool: Pools, engine: str, wire: str, clip: str, poison: float
) -> None:
    case = Case(engine=engine, dtype=torch.float32, clip=clip, poison=poison, wire=wire)
    for result in pool(2).call(engine_step, case):
        assert not math.isfinite(result["norm"])


@pytest.mark.parametrize("scale", [1000.0, 65536.0])
@pytest.mark.parametrize("clip", CLIP_MODES)
@pytest.mark.parametrize(("engine", "dtype", "tolerance"), [BOTH[0], BOTH[2]], ids=["bucketed", "ddp"])
def test_loss_scale_leaves_no_trace(
    pool: Pools, engine: str, dtype: torch.dtype, tolerance: float, clip: str, scale: float
) -> None:
    case = Case(engine=engine, dtype=dtype, clip=clip, scale=scale, accumulation=2)
    results = pool(2).call(engine_step, case)
    assert_equal_gradients(results, oracle(case, 2), tolerance)
    plain = pool(2).call(engine_step, replace(case, scale=None))
    assert results[0]["norm"] == pytest.approx(plain[0]["norm"], rel=tolerance * 10)


@pytest.mark.parametrize("engine", ["bucketed", "ddp"])
def test_clip_statistics_count_what_was_clipped(pool: Pools, engine: str) -> None:
    case = Case(engine=engine, dtype=torch.float32, clip="global_before_reduce")
    small, large = (r["clip"]["model"] for r in pool(2).call(engine_step, case))
    assert small == {"clipped_share": 0.0, "mean_coefficient": 1.0}
    expected = case.max_norm / global_norm(local_gradients(case, 1))
    assert large["clipped_share"] == 1.0
    assert large["mean_coefficient"] == pytest.approx(expected, rel=1e-5)


# ---- when buckets leave ---------------------------------------------------------------------------------------------


def collectives_by_phase(_rank: int, _world: int, case: Case) -> dict[str, int]:
    """All-reduces that the reducer has started in the first micro-batch, in the last one's backward, in `finish`."""
    model = Toy(case.dtype)
    reducer = make_engine(model, case)
    started = 0
    real = dist.all_reduce

    def counting(*args: Any, **kwargs: Any) -> Any:
        nonlocal started
        started += 1
        return real(*args, **kwargs)

    def phases() -> Iterator[int]:
        reducer.zero_grad()
        for last in (False, True):
            with reducer.micro_batch(last):
                loss_of(model, case, 0, 0).backward()
            yield started
        reducer.finish()
        yield started

    dist.all_reduce = counting
    try:
        first, backward, finish = phases()
    finally:
        dist.all_reduce = real
    num_buckets = len(reducer.layout.buckets)
    return {"first": first, "backward": backward - first, "finish": finish - backward, "buckets": num_buckets}


@pytest.mark.parametrize("clip", CLIP_MODES)
def test_buckets_leave_during_backward_of_the_last_micro_batch(pool: Pools, clip: str) -> None:
    """Except where the whole local gradient must be known first."""
    for counts in pool(2).call(collectives_by_phase, Case(clip=clip, bucket_mb=EVERY_TENSOR)):
        assert counts["buckets"] > 3
        early, late = (0, counts["buckets"]) if clip == "global_before_reduce" else (counts["buckets"], 0)
        assert (counts["first"], counts["backward"], counts["finish"]) == (0, early, late)
