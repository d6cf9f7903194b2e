"""Clip coefficients, and clipping by the reducer on one rank, on gradients given outright, with a loss scale."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from bert_fast.communication.buckets import plan_layout
from bert_fast.communication.clip import ClipStatistics, coefficient, group_threshold
from bert_fast.communication.reducer import BucketReducer
from bert_fast.communication.wire_format import wire_format
from bert_fast.config.choices import CLIP_MODES

BY_FIRST_NAME = {"a": "^a", "b": "^b", "c": "^c"}
SIZES = {"a.x": 3, "b.x": 40, "c.x": 17, "a.y": 16, "b.y": 1, "c.y": 5, "a.z": 33}
ORDERS = ([0, 1, 2, 3, 4, 5, 6], [6, 4, 2, 0, 5, 3, 1])  # groups are not runs of either


@pytest.mark.parametrize(
    ("norm", "threshold", "scale", "expected"),
    [
        (2.0, 1.0, None, 0.5),
        (1.0, 1.0, None, 1.0),
        (0.5, 1.0, None, 1.0),
        (0.0, 1.0, None, 1.0),
        (2.0, 1.0, 8.0, 1.0),
        (32.0, 1.0, 8.0, 0.25),
        (1e-45, 1.0, None, 1.0),
    ],
)
def test_coefficient(norm: float, threshold: float, scale: float | None, expected: float) -> None:
    value = coefficient(torch.tensor(norm), threshold, None if scale is None else torch.tensor(scale))
    assert value.shape == ()
    assert value.item() == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("norm", [float("inf"), float("nan")])
@pytest.mark.parametrize("scale", [None, 8.0])
def test_norm_that_is_not_finite_becomes_nan(norm: float, scale: float | None) -> None:
    """A coefficient of zero would hide an overflow from all other ranks."""
    assert math.isnan(coefficient(torch.tensor(norm), 1.0, None if scale is None else torch.tensor(scale)).item())


@given(st.floats(1e-30, 1e30), st.floats(1e-6, 1e6), st.floats(1.0, 65536.0))
def test_clipping_brings_the_norm_to_the_limit_and_never_raises_it(norm: float, threshold: float, scale: float) -> None:
    value = coefficient(
        torch.tensor(norm, dtype=torch.float64), threshold, torch.tensor(scale, dtype=torch.float64)
    ).item()
    assert 0 < value <= 1
    assert norm * value <= threshold * scale * (1 + 1e-9)
    if norm <= threshold * scale * (1 - 1e-9):
        assert value == 1.0


def test_group_thresholds_add_up_to_the_whole() -> None:
    assert 7 * group_threshold(2.0, 7) ** 2 == pytest.approx(4.0)


def test_statistics_are_means_over_steps_and_start_anew() -> None:
    statistics = ClipStatistics(["a", "b"], torch.device("cpu"))
    for first, second in ((1.0, 0.5), (0.25, 0.5), (1.0, 1.0), (1.0, float("nan"))):
        statistics.add(0, torch.tensor(first))
        statistics.add(1, torch.tensor(second))
        statistics.end_step()
    statistics.end_step()
    read = statistics.read()
    assert read["a"] == {"clipped_share": 0.25, "mean_coefficient": pytest.approx(3.25 / 4)}
    assert read["b"] == {"clipped_share": 0.5, "mean_coefficient": 0.5}
    assert statistics.read()["a"] == {"clipped_share": 0.0, "mean_coefficient": 0.0}


# ---- by the reducer --------------------------------------------------------------------------------------------------


class Given(nn.Module):
    """The gradients of this loss are the numbers that are handed in, exactly."""

    def __init__(self, sizes: dict[str, int], dtype: torch.dtype) -> None:
        super().__init__()
        for name, size in sizes.items():
            outer, inner = name.split(".")
            if outer not in self._modules:
                self.add_module(outer, nn.Module())
            self.get_submodule(outer).register_parameter(inner, nn.Parameter(torch.ones(size, dtype=dtype)))

    def forward(self, gradients: dict[str, torch.Tensor]) -> torch.Tensor:
        return torch.stack([(self.get_parameter(name) * g).sum() for name, g in gradients.items()]).sum()


@dataclass(frozen=True)
class Way:
    """How gradients are clipped and laid out."""

    clip: str
    max_norm: float = 1.0
    clip_groups: Any = None
    bucket_mb: Any = 1e-4
    order: tuple[int, ...] | None = None  # places in the sizes that are handed in; None: as they stand there
    dtype: torch.dtype = torch.float64

    def reducer(self, sizes: dict[str, int]) -> BucketReducer:
        model = Given(sizes, self.dtype)
        named = {name: p.numel() for name, p in model.named_parameters()}
        place = {name: index for index, name in enumerate(named)}
        ready = list(sizes) if self.order is None else [list(sizes)[index] for index in self.order]
        layout = plan_layout(
            list(named), list(named.values()), [place[name] for name in ready],
            clip_groups=self.clip_groups or BY_FIRST_NAME, bucket_mb=self.bucket_mb,
            whole_groups=self.clip == "bucket_before_reduce",
        )  # fmt: skip
        return BucketReducer(
            model, layout, clip=self.clip, max_norm=self.max_norm, wire=wire_format("fp32", self.dtype)
        )


Gradients = dict[str, torch.Tensor]


def drawn(seed: int, dtype: torch.dtype = torch.float64, sizes: dict[str, int] = SIZES) -> Gradients:
    """Gradients whose groups differ in size by orders of magnitude: some are clipped and some are not."""
    generator = torch.Generator().manual_seed(seed)
    factor = {"a": 3.0, "b": 1e-3, "c": 0.3}
    return {
        name: (factor.get(name[0], 1.0) * torch.randn(size, generator=generator, dtype=torch.float64)).to(dtype)
        for name, size in sizes.items()
    }


def reduced(
    reducer: BucketReducer, micro_batches: list[Gradients], scale: torch.Tensor | None = None
) -> tuple[Gradients, float]:
    """Gradients and norm after a step."""
    reducer.zero_grad()
    for number, gradients in enumerate(micro_batches):
        with reducer.micro_batch(number == len(micro_batches) - 1, scale):
            loss = reducer.module(gradients)
            (loss if scale is None else loss * scale).backward()
    norm = reducer.finish().item()
    return {name: p.grad.clone() for name, p in reducer.module.named_parameters()}, norm


def plainly_clipped(
    micro_batches: list[Gradients], clip: str, max_norm: float, groups: dict[str, list[str]]
) -> Gradients:
    """What the config documents, written down with Python's floats."""
    total = {name: sum(g[name].double() for g in micro_batches).tolist() for name in micro_batches[0]}
    if clip != "bucket_before_reduce":
        groups = {"all": list(total)}
    if clip != "none":
        for names in groups.values():
            norm = math.sqrt(math.fsum(x * x for name in names for x in total[name]))
            limit = max_norm / math.sqrt(len(groups))
            for name in names:
                total[name] = [x * limit / norm if norm > limit else x for x in total[name]]
    return {name: torch.tensor(values, dtype=torch.float64) for name, values in total.items()}


def members(sizes: dict[str, int]) -> dict[str, list[str]]:
    return {first: [name for name in sizes if name.startswith(first)] for first in dict.fromkeys(n[0] for n in sizes)}


def assert_bits(found: Gradients, expected: Gradients) -> None:
    for name, gradient in found.items():
        assert torch.equal(gradient, expected[name]), name


def assert_near(found: Gradients, expected: Gradients, rel: float) -> None:
    for name, gradient in found.items():
        torch.testing.assert_close(gradient.double(), expected[name], rtol=rel, atol=1e-300)


# ---- against the plain implementation -------------------------------------------------------------------------------


@given(
    clip=st.sampled_from(list(CLIP_MODES)), rng=st.randoms(use_true_random=False),
    scale=st.sampled_from([None, 1.0, 3.7, 65536.0]),
    max_norm=st.floats(1e-4, 1e3), micro_batches=st.integers(1, 3),
    bucket_mb=st.one_of(st.floats(1e-6, 1e-3), st.lists(st.floats(1e-6, 1e-3), min_size=1, max_size=4)),
)  # fmt: skip
def test_equals_clipping_written_down(
    clip: str, rng: Any, scale: float | None, max_norm: float, micro_batches: int, bucket_mb: Any
) -> None:
    """Any number of groups, members of a group anywhere in ready order; what is clipped is the sum of micro-batches."""
    sizes = {f"{rng.choice('abcdefg')}.p{i}": rng.randint(1, 50) for i in range(rng.randint(1, 9))}
    batches = [drawn(rng.randrange(10**6), sizes=sizes) for _ in range(micro_batches)]
    order = tuple(rng.sample(range(len(sizes)), len(sizes)))
    groups = {first: f"^{first}" for first in members(sizes)}
    reducer = Way(clip, max_norm, groups, bucket_mb, order).reducer(sizes)
    found, _ = reduced(reducer, batches, None if scale is None else torch.tensor(scale, dtype=torch.float64))
    assert_near(found, plainly_clipped(batches, clip, max_norm, members(sizes)), rel=1e-11)


# ---- buckets are a matter of speed, groups are not ------------------------------------------------------------------

BUCKETS = [1e-9, 1e-4, 1.5e-4, 3e-4, 25.0, [1e-9, 25.0], [2e-4, 1e-9]]


@pytest.mark.parametrize("scale", [None, 65536.0])
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("clip", CLIP_MODES)
def test_buckets_do_not_change_a_bit(clip: str, order: list[int], scale: float | None) -> None:
    results, counts = [], set()
    for bucket_mb in BUCKETS:
        reducer = Way(clip, bucket_mb=bucket_mb, order=tuple(order), dtype=torch.float32).reducer(SIZES)
        counts.add(len(reducer.layout.buckets))
        results.append(reduced(reducer, [drawn(1, torch.float32)], None if scale is None else torch.tensor(scale)))
    assert len(counts) > 2
    for found, norm in results[1:]:
        assert_bits(found, results[0][0])
        assert norm == results[0][1]


def test_clip_groups_change_the_result() -> None:
    """Each by its own norms, which the plain implementation confirms."""
    schemes = {
        "first name": (BY_FIRST_NAME, members(SIZES)),
        "all": ("model", {"all": list(SIZES)}),
        "tensor": ("tensor", {name: [name] for name in SIZES}),
    }
    results = []
    for groups, names in schemes.values():
        found, _ = reduced(Way("bucket_before_reduce", 0.5, groups).reducer(SIZES), [drawn(1)])
        assert_near(found, plainly_clipped([drawn(1)], "bucket_before_reduce", 0.5, names), rel=1e-12)
        results.append(found)
    for number, one in enumerate(results):
        for other in results[:number]:
            assert not torch.allclose(one["a.x"], other["a.x"], rtol=0.01)


def test_a_group_at_its_threshold_is_left_alone() -> None:
    """Four groups and c = 2: each may have a norm of 1."""
    values = {"a.x": 1.0, "b.x": 1.001, "c.x": 0.999, "d.x": 2.0}
    gradients = {name: torch.eye(16, dtype=torch.float64)[3] * value for name, value in values.items()}
    scheme = {name[0]: f"^{name[0]}" for name in values}
    reducer = Way("bucket_before_reduce", 2.0, scheme).reducer(dict.fromkeys(values, 16))
    found, norm = reduced(reducer, [gradients])
    assert torch.equal(found["a.x"], gradients["a.x"])
    assert torch.equal(found["c.x"], gradients["c.x"])
    largest = {name: g.max().item() for name, g in found.items()}
    assert largest == pytest.approx({"a.x": 1.0, "b.x": 1.0, "c.x": 0.999, "d.x": 1.0}, rel=1e-15)
    assert norm == pytest.approx(math.sqrt(3 + 0.999**2), rel=1e-15)
    shares = {name: entry["clipped_share"] for name, entry in reducer.clip_statistics.read().items()}
    assert shares == {"a": 0.0, "b": 1.0, "c": 0.0, "d": 1.0}


# ---- under a loss scale ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scale", [2.0**-4, 2.0, 1024.0, 65536.0])
@pytest.mark.parametrize("micro_batches", [1, 3])
@pytest.mark.parametrize("clip", CLIP_MODES)
def test_a_power_of_two_as_loss_scale_leaves_not_a_bit_of_trace(clip: str, micro_batches: int, scale: float) -> None:
    """In fp32, gradient, norm and what is said of clipping are those without a scale: it only moves exponents."""
    batches = [drawn(seed, torch.float32) for seed in range(micro_batches)]
    results, said = [], []
    for value in (None, torch.tensor(scale)):
        reducer = Way(clip, dtype=torch.float32).reducer(SIZES)
        results.append(reduced(reducer, batches, value))
        said.append(reducer.clip_statistics.read())
    assert_bits(results[1][0], results[0][0])
    assert results[1][1] == results[0][1]
    assert said[0] == said[1]
    assert_near(results[0][0], plainly_clipped(batches, clip, 1.0, members(SIZES)), rel=1e-5)


@pytest.mark.parametrize("clip", CLIP_MODES)
def test_a_scale_that_changes_from_step_to_step(clip: str) -> None:
    """As after an overflow: each step is unscaled by the scale that it ran under, also one without any after one with."""
    reducer = Way(clip).reducer(SIZES)
    for scale in (65536.0, 32768.0, None, 8.0):
        found, _ = reduced(reducer, [drawn(2)], None if scale is None else torch.tensor(scale, dtype=torch.float64))
        assert_near(found, plainly_clipped([drawn(2)], clip, 1.0, members(SIZES)), rel=1e-12)


@pytest.mark.parametrize("clip", ["none", "bucket_before_reduce"])  # the modes that the config allows for it
def test_an_update_by_bucket_gets_unscaled_gradients(clip: str) -> None:
    """Though it may change the scale's own value in place, as `LossScale.load_state_dict` does."""
    reducer = Way(clip).reducer(SIZES)
    reducer.enable_nonfinite_flag()
    scale = torch.tensor(1024.0, dtype=torch.float64)
    expected = plainly_clipped([drawn(3)], clip, 1.0, members(SIZES))
    names = dict(enumerate(reducer.layout.ordering.names))
    seen: Gradients = {}

    def update(number: int, found_inf: torch.Tensor) -> None:
        assert found_inf.item() == 0
        scale.mul_(0.5)
        for index in reducer.layout.buckets[number].parameters:
            seen[names[index]] = reducer.module.get_parameter(names[index]).grad.clone()

    reducer.zero_grad()
    with reducer.micro_batch(True, scale):
        (reducer.module(drawn(3)) * scale).backward()
    reducer.finish(update)
    assert len(reducer.layout.buckets) > 1
    assert list(seen) == [names[index] for index in reducer.layout.ordering.order]
    assert_near(seen, expected, rel=1e-12)


# ---- gradients that are not finite ----------------------------------------------------------------------------------


@pytest.mark.parametrize("scale", [None, 65536.0])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_one_bad_group_is_nan_and_the_others_are_as_ever(bad: float, scale: float | None) -> None:
    """An infinite norm must not become a coefficient of zero, and the other groups' norms know nothing of it."""
    reducer = Way("bucket_before_reduce").reducer(SIZES)
    spoiled = drawn(4)
    spoiled["b.x"] = spoiled["b.x"].index_fill(0, torch.tensor([7]), bad)
    value = None if scale is None else torch.tensor(scale, dtype=torch.float64)
    found, norm = reduced(reducer, [spoiled], value)
    assert not math.isfinite(norm)
    expected = plainly_clipped([drawn(4)], "bucket_before_reduce", 1.0, members(SIZES))
    for name, gradient in found.items():
        if name.startswith("b"):
            assert gradient.isnan().all(), name
        else:
            torch.testing.assert_close(gradient, expected[name], rtol=1e-12, atol=0)
    found, norm = reduced(reducer, [drawn(4)], value)
    assert math.isfinite(norm)
    assert_near(found, expected, rel=1e-12)


@pytest.mark.parametrize("clip", CLIP_MODES)
def test_an_overflow_by_the_scale_alone_shows(clip: str) -> None:
    """Gradients are fine, times the loss scale they are not: the step must be skipped."""
    reducer = Way(clip, dtype=torch.float32).reducer(SIZES)
    gradients = {name: g * 1e4 for name, g in drawn(5, torch.float32).items()}
    _, norm = reduced(reducer, [gradients], torch.tensor(2.0**120))
    assert not math.isfinite(norm)
    _, norm = reduced(reducer, [gradients], torch.tensor(2.0**10))
    assert math.isfinite(norm)
