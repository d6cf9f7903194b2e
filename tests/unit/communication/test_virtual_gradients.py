"""Virtual ranks on one real one: bit for bit the sum, in the order of ranks, of what each would send."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import nn

from bert_fast.communication.buckets import plan_layout
from bert_fast.communication.reducer import BucketReducer
from bert_fast.communication.wire_format import WireFormat
from bert_fast.config.choices import CLIP_MODES

SIZES = {"embeddings.a": (7, 5), "layers.0.a": (5, 5), "layers.0.b": (5,), "layers.1.a": (5, 3), "heads.a": (11,)}
MICRO_BATCHES = 2  # of each virtual rank
MAX_NORM = 32.0  # a group's threshold is a power of two, which rounds nothing

Gradients = list[torch.Tensor]  # of a rank or micro-batch, parameter by parameter


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


class Weights(nn.Module):
    """Parameters whose gradient is whatever a test wants."""

    def __init__(self) -> None:
        super().__init__()
        self.values = nn.ParameterList(nn.Parameter(torch.zeros(shape)) for shape in SIZES.values())

    def backward(self, gradients: Gradients) -> None:
        """Add `gradients`, in the order of SIZES."""
        total = sum((p * g).sum() for p, g in zip(self.values, gradients, strict=True))
        assert isinstance(total, torch.Tensor)
        total.backward()


def reducer_of(clip: str, wire: WireFormat, ranks: int) -> tuple[Weights, BucketReducer]:
    model = Weights()
    layout = plan_layout(
        list(SIZES), [math.prod(shape) for shape in SIZES.values()], list(reversed(range(len(SIZES)))), clip_groups="layer",
        bucket_mb=1e-4, whole_groups=clip == "bucket_before_reduce",
    )  # fmt: skip
    assert len(layout.buckets) > 1
    reducer = BucketReducer(model, layout, clip=clip, max_norm=MAX_NORM, wire=wire)
    if ranks > 1:
        reducer.enable_virtual_ranks(ranks)
    return model, reducer


def drawn(ranks: int, seed: int = 3) -> list[list[Gradients]]:
    """Gradients of every micro-batch of every rank; some ranks are clipped and some are not.

    They are small whole numbers, so that norms are exact in whatever order squares are added.
    """
    generator = torch.Generator().manual_seed(seed)
    return [
        [
            [torch.randint(-3, 4, shape, generator=generator) * (1.0 + rank) for shape in SIZES.values()]
            for _ in range(MICRO_BATCHES)
        ]
        for rank in range(ranks)
    ]


def run(
    model: Weights,
    reducer: BucketReducer,
    ranks: list[list[Gradients]],
    scale: torch.Tensor | None = None,
    update: Callable[[int, torch.Tensor], None] | None = None,
) -> torch.Tensor:
    """A step: the norm that `finish` returns."""
    reducer.zero_grad()
    for rank, batches in enumerate(ranks):
        for number, gradients in enumerate(batches):
            with reducer.micro_batch(rank == len(ranks) - 1 and number == len(batches) - 1, scale):
                model.backward(gradients if scale is None else [scale * g for g in gradients])
        if rank < len(ranks) - 1:
            reducer.end_virtual_rank()
    return reducer.finish(update)


# ---- the oracle -------------------------------------------------------------------------------------------------------


def group_of(name: str) -> str:
    return ".".join(name.split(".")[:2]) if name.startswith("layers") else name.split(".")[0]


def clipped(gradients: Gradients, groups: list[list[int]], limit: float) -> Gradients:
    """Gradients of which each group is scaled down to a norm of at most `limit`."""
    values = list(gradients)
    for members in groups:
        norm = torch.linalg.vector_norm(torch.cat([values[i].reshape(-1) for i in members]))
        for i in members:
            values[i] = values[i] * torch.clamp(limit / norm, max=1.0)
    return values


def oracle(ranks: list[list[Gradients]], clip: str, dtype: torch.dtype) -> Gradients:
    """The averaged gradient: each rank's is summed, clipped, divided and cast; the sum over ranks has the wire's dtype."""
    by_group: dict[str, list[int]] = {}
    for place, name in enumerate(SIZES):
        by_group.setdefault(group_of(name), []).append(place)
    groups = list(by_group.values()) if clip == "bucket_before_reduce" else [list(range(len(SIZES)))]
    total: Gradients | None = None
    for batches in ranks:
        mine = [torch.stack(parts).sum(dim=0) for parts in zip(*batches, strict=True)]
        if CLIP_MODES[clip].before_reduce:
            mine = clipped(mine, groups, MAX_NORM / math.sqrt(len(groups)))
        sent = [(values * (1.0 / len(ranks))).to(dtype) for values in mine]
        total = sent if total is None else [a + b for a, b in zip(total, sent, strict=True)]
    assert total is not None
    mean = [values.float() for values in total]
    return clipped(mean, groups, MAX_NORM) if CLIP_MODES[clip].after_reduce else mean


# ---- the tests --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("num_ranks", [4, 8])
@pytest.mark.parametrize("clip", CLIP_MODES)
def test_bit_for_bit_the_sum_in_the_order_of_ranks(clip: str, num_ranks: int, dtype: torch.dtype) -> None:
    model, reducer = reducer_of(clip, WireFormat(dtype), num_ranks)
    for seed in (3, 4):  # a second step on the same buffers
        ranks = drawn(num_ranks, seed)
        run(model, reducer, ranks)
        for parameter, expected in zip(model.values, oracle(ranks, clip, dtype), strict=True):
            assert parameter.grad is not None
            assert torch.equal(parameter.grad, expected)


def test_the_oracle_tells_modes_ranks_formats_and_orders_apart() -> None:
    """Else the test above could not fail."""
    ranks, single, narrow = drawn(4), torch.float32, torch.bfloat16
    mode = "bucket_before_reduce"
    found = [oracle(ranks, clip, single)[0] for clip in CLIP_MODES]
    found += [
        oracle(ranks, mode, narrow)[0],
        oracle(ranks[::-1], mode, narrow)[0],
        oracle(ranks[::-1], mode, single)[0],
    ]
    as_one = [[[g / 4 for g in gradients] for batches in ranks for gradients in batches]]
    found.append(oracle(as_one, mode, single)[0])
    for number, one in enumerate(found):
        assert not any(torch.equal(one, other) for other in found[:number])


@pytest.mark.parametrize("clip", CLIP_MODES)
def test_a_power_of_two_as_loss_scale_leaves_not_a_bit_of_trace(clip: str) -> None:
    ranks = drawn(4)
    model, reducer = reducer_of(clip, WireFormat(torch.float32), 4)
    run(model, reducer, ranks, torch.tensor(1024.0))
    for parameter, expected in zip(model.values, oracle(ranks, clip, torch.float32), strict=True):
        assert parameter.grad is not None
        assert torch.equal(parameter.grad, expected)


def test_small_values_pass_a_scaled_wire() -> None:
    """Values below fp16's smallest are lost without the wire's scale, and the kept sum has it as well."""
    ranks = [[[1e-7 * g for g in gradients] for gradients in batches] for batches in drawn(4)]
    model, reducer = reducer_of("none", WireFormat(torch.float16, 2.0**14), 4)
    run(model, reducer, ranks)
    for parameter, expected in zip(model.values, oracle(ranks, "none", torch.float32), strict=True):
        torch.testing.assert_close(parameter.grad, expected, rtol=2**-8, atol=1e-9)


@pytest.mark.parametrize("bad", [math.inf, math.nan])
@pytest.mark.parametrize("rank", [0, 2, 3])
@pytest.mark.parametrize("clip", CLIP_MODES)
def test_a_virtual_rank_that_is_not_finite_shows(clip: str, rank: int, bad: float) -> None:
    model, reducer = reducer_of(clip, WireFormat(torch.float32), 4)
    reducer.enable_nonfinite_flag()
    ranks, flags = drawn(4), []
    ranks[rank][0][1][0] = bad
    assert not math.isfinite(run(model, reducer, ranks, update=lambda _, flag: flags.append(flag.item())))
    assert set(flags) == {1.0}
    flags.clear()
    assert math.isfinite(run(model, reducer, drawn(4), update=lambda _, flag: flags.append(flag.item())))
    assert set(flags) == {0.0}, "and is gone in the next step"


@pytest.mark.parametrize("clip", CLIP_MODES)
def test_statistics_count_every_virtual_rank(clip: str) -> None:
    small = [[[torch.full(shape, 1e-3) for shape in SIZES.values()]] for _ in range(4)]
    small[1] = [[torch.full(shape, 1000.0) for shape in SIZES.values()]]
    model, reducer = reducer_of(clip, WireFormat(torch.float32), 4)
    run(model, reducer, small)
    run(model, reducer, small)
    shares = {values["clipped_share"] for values in reducer.clip_statistics.read().values()}
    assert shares == {{"none": 0.0, "global_after_reduce": 1.0}.get(clip, 0.25)}
    run(model, reducer, small)
    for _ in range(3):  # as a captured step that ran again, in which nothing was clipped
        reducer.count_replay(0)
    shares = {values["clipped_share"] for values in reducer.clip_statistics.read().values()}
    assert shares == {{"none": 0.0, "global_after_reduce": 0.25}.get(clip, 0.0625)}


def test_a_step_that_an_exception_ended_leaves_nothing() -> None:
    model, reducer = reducer_of("bucket_before_reduce", WireFormat(torch.float32), 4)
    reducer.zero_grad()
    with reducer.micro_batch(False):
        model.backward(drawn(1, seed=9)[0][0])
    reducer.end_virtual_rank()
    ranks = drawn(4)
    run(model, reducer, ranks)
    for parameter, expected in zip(model.values, oracle(ranks, "bucket_before_reduce", torch.float32), strict=True):
        assert parameter.grad is not None
        assert torch.equal(parameter.grad, expected)


def test_a_step_without_all_its_virtual_ranks_is_a_bug() -> None:
    model, reducer = reducer_of("none", WireFormat(torch.float32), 4)
    with pytest.raises(AssertionError, match="every virtual rank but the last"):
        run(model, reducer, drawn(3))
