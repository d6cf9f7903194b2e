"""GradientLayout of gradients, clip coefficients, and the reducer on one rank against autograd and clipping as one would write it."""

from __future__ import annotations

import math
import re
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from bert_fast.communication.buckets import (
    FlatGradients,
    GradientLayout,
    clip_group_of,
    measure_ready_order,
    plan_layout,
)
from bert_fast.communication.clip import ClipStatistics, coefficient, group_threshold
from bert_fast.communication.reducer import BucketReducer
from bert_fast.communication.wire_format import WireFormat, wire_format
from bert_fast.config import ModelConfig
from bert_fast.config.choices import CLIP_MODES
from bert_fast.errors import UserError
from bert_fast.model.bert import BertForPretraining

MIB = 2**20


# ---- layout ---------------------------------------------------------------------------------------------------------


def bert_names(num_layers: int = 3) -> tuple[list[str], list[int]]:
    config = ModelConfig(
        vocab_size=50, hidden_size=12, num_layers=num_layers, num_heads=2, intermediate_size=20, max_positions=16
    )
    with torch.device("meta"):
        named = list(BertForPretraining(config).named_parameters())
    return [name for name, _ in named], [p.numel() for _, p in named]


def layout_of(names: list[str], numel: list[int], order: list[int] | None = None, **changes: Any) -> GradientLayout:
    settings: dict[str, Any] = {"clip_groups": "layer", "bucket_mb": 0.002, "whole_groups": True, **changes}
    return plan_layout(names, numel, order or list(reversed(range(len(names)))), **settings)


def check_layout(layout: GradientLayout, whole_groups: bool) -> None:
    count = len(layout.ordering.names)
    everyone = list(range(count))
    assert sorted(layout.ordering.order) == everyone
    # Places: in order, aligned, without overlap, and without waste beyond the alignment.
    end = 0
    for index in layout.ordering.order:
        assert layout.offsets[index] == end
        assert end % 16 == 0
        end += math.ceil(layout.numel[index] / 16) * 16
    assert layout.size == end
    # Groups and buckets: both partition the parameters and the buffer, contiguously.
    for spans in (layout.groups, layout.buckets):
        assert [i for span in spans for i in span.parameters] == list(layout.ordering.order)
        place = 0
        for span in spans:
            assert span.start == place == layout.offsets[span.parameters[0]]
            place = span.end
        assert place == layout.size
    for number, bucket in enumerate(layout.buckets):
        assert all(layout.bucket_of[index] == number for index in bucket.parameters)
    if whole_groups:
        contained = [layout.groups_in(bucket) for bucket in layout.buckets]
        assert [g for groups in contained for g in groups] == list(range(len(layout.groups)))
        for bucket, groups in zip(layout.buckets, contained, strict=True):
            assert [i for g in groups for i in layout.groups[g].parameters] == list(bucket.parameters)


@given(
    st.integers(1, 4), st.sampled_from(["layer", "tensor", "model", {"norms": "norm", "rest": "."}]),
    st.floats(1e-5, 0.1), st.booleans(), st.randoms(use_true_random=False),
)  # fmt: skip
def test_layout_covers_everything_once(num_layers: int, scheme: Any, bucket_mb: float, whole: bool, rng: Any) -> None:
    names, numel = bert_names(num_layers)
    order = list(range(len(names)))
    rng.shuffle(order)
    check_layout(layout_of(names, numel, order, clip_groups=scheme, bucket_mb=bucket_mb, whole_groups=whole), whole)


def test_groups_come_in_the_order_in_which_they_are_complete() -> None:
    layout = layout_of(*bert_names())
    assert [group.name for group in layout.groups] == ["heads", "layers.2", "layers.1", "layers.0", "embeddings"]


def test_a_group_waits_for_its_last_member() -> None:
    names = ["a.x", "b.x", "a.y", "b.y"]
    layout = plan_layout(
        names, [1, 1, 1, 1], [0, 1, 3, 2], clip_groups={"a": "^a", "b": "^b"}, bucket_mb=1.0, whole_groups=True
    )
    assert [group.name for group in layout.groups] == ["b", "a"]
    assert layout.ordering.order == (1, 3, 0, 2)


def test_layout_says_whether_groups_are_runs_of_the_ready_order() -> None:
    """What engine `ddp` needs for clipping by groups: its buckets follow the ready order."""
    settings: dict[str, Any] = {"clip_groups": {"a": "^a", "b": "^b"}, "bucket_mb": 1.0, "whole_groups": True}
    names = ["a.x", "b.x", "a.y", "b.y"]
    assert plan_layout(names, [1] * 4, [0, 2, 1, 3], **settings).ordering.in_ready_order
    assert not plan_layout(names, [1] * 4, [0, 1, 2, 3], **settings).ordering.in_ready_order


def test_without_whole_groups_ready_order_of_single_tensors_is_kept_inside_groups() -> None:
    names, numel = bert_names(1)
    layout = layout_of(names, numel, bucket_mb=1e-6, whole_groups=False)
    assert len(layout.buckets) == len(names)
    check_layout(layout, whole_groups=False)


def test_a_bucket_closes_when_it_has_reached_its_size() -> None:
    """Four tensors of 1 MiB: caps of 1, 2 and then always 1."""
    names, numel = [f"p{i}" for i in range(6)], [MIB // 4] * 6

    def sizes(bucket_mb: Any) -> list[int]:
        layout = plan_layout(names, numel, list(range(6)), clip_groups="tensor", bucket_mb=bucket_mb, whole_groups=True)
        return [len(bucket.parameters) for bucket in layout.buckets]

    assert sizes(1.0) == [1] * 6
    assert sizes(1.5) == [2, 2, 2]
    assert sizes(100.0) == [6]
    assert sizes([1.0, 2.0]) == [1, 2, 2, 1], "the last size repeats"
    assert sizes([3.0, 1.0]) == [3, 1, 1, 1]
    assert sizes([4.5]) == [5, 1]


def test_element_size_counts() -> None:
    settings: dict[str, Any] = {"clip_groups": "tensor", "bucket_mb": 1.0, "whole_groups": True}
    layout = plan_layout(["a", "b"], [MIB // 4] * 2, [0, 1], element_bytes=2, **settings)
    assert len(layout.buckets) == 1


@pytest.mark.parametrize("scheme", ["layer", "tensor", "model", {"norms": "norm", "rest": "."}])
def test_clip_groups_do_not_depend_on_bucket_sizes(scheme: Any) -> None:
    """Numerics come from the config, buckets are a matter of speed."""
    names, numel = bert_names()
    layouts = [
        layout_of(names, numel, clip_groups=scheme, bucket_mb=mb, whole_groups=whole)
        for mb in (1e-6, 0.001, 0.01, 100.0, [0.001, 0.5])
        for whole in (True, False)
    ]
    assert len({len(layout.buckets) for layout in layouts}) > (1 if scheme == "model" else 2)
    assert all(layout.groups == layouts[0].groups for layout in layouts)


@pytest.mark.parametrize(
    ("name", "scheme", "group"),
    [
        ("layers.11.qkv.weight", "layer", "layers.11"),
        ("embeddings.word.weight", "layer", "embeddings"),
        ("heads.decoder_bias", "layer", "heads"),
        ("layers.1.qkv.weight", "tensor", "layers.1.qkv.weight"),
        ("layers.1.qkv.weight", "model", "model"),
        ("layers.1.qkv.weight", {"attention": "qkv|attention", "layers": "layers"}, "attention"),
    ],
)
def test_clip_group_of(name: str, scheme: Any, group: str) -> None:
    assert clip_group_of(name, scheme) == group


def test_pattern_that_leaves_a_parameter_out_names_it() -> None:
    with pytest.raises(
        UserError, match=r"no pattern matches parameter embeddings\.word\.weight; add one, or a last '\.\*'"
    ):
        layout_of(*bert_names(), clip_groups={"layers": "^layers", "heads": "^heads"})


def test_pattern_that_matches_nothing_is_named() -> None:
    with pytest.raises(UserError, match=r"pattern of group lost matches no parameter"):
        layout_of(*bert_names(), clip_groups={"lost": "^nothing", "all": "."})


def test_measured_ready_order_is_that_of_backward() -> None:
    first, second, unused = (nn.Parameter(torch.ones(2)) for _ in range(3))

    def backward() -> None:
        ((first * 2).tanh() * second).sum().backward()

    assert measure_ready_order([first, second, unused], backward) == [1, 0, 2]
    assert not first._post_accumulate_grad_hooks, "hooks are removed"


def test_measured_ready_order_counts_a_shared_parameter_once() -> None:
    shared, other = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))
    order = measure_ready_order([shared, other], lambda: (shared * (other * shared)).sum().backward())
    assert sorted(order) == [0, 1]


def test_gradients_are_views_of_one_buffer() -> None:
    model = nn.Sequential(nn.Linear(3, 5), nn.Linear(5, 2))
    names, numel = zip(*((name, p.numel()) for name, p in model.named_parameters()), strict=True)
    layout = plan_layout(names, numel, [3, 2, 1, 0], clip_groups="tensor", bucket_mb=1.0, whole_groups=True)
    flat = FlatGradients(list(model.parameters()), layout)
    model(torch.randn(4, 3)).sum().backward()
    for parameter, offset in zip(model.parameters(), layout.offsets, strict=True):
        assert torch.equal(flat.buffer[offset : offset + parameter.numel()], parameter.grad.flatten())
        assert parameter.grad.abs().sum() > 0
    assert flat.buffer.norm() == pytest.approx(torch.cat([p.grad.flatten() for p in model.parameters()]).norm().item())
    flat.zero()
    assert all((p.grad == 0).all() for p in model.parameters())
    model.zero_grad(set_to_none=True)
    flat.attach()
    assert all(p.grad is not None for p in model.parameters())


# ---- clipping -------------------------------------------------------------------------------------------------------


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


# ---- what travels ---------------------------------------------------------------------------------------------------


def test_wire_format_of_the_gradients_own_dtype_copies_nothing() -> None:
    bucket = torch.randn(8, dtype=torch.float64)
    wire = wire_format("fp32", torch.float64)
    assert wire.encode(0, bucket) is bucket
    wire.decode(bucket, bucket)
    wire.count(bucket)
    assert wire.bytes_sent == 64


@pytest.mark.parametrize(("name", "dtype"), [("bf16", torch.bfloat16), ("fp16", torch.float16)])
def test_wire_format_casts_there_and_back(name: str, dtype: torch.dtype) -> None:
    bucket = torch.randn(8)
    original = bucket.clone()
    wire = wire_format(name, torch.float32)
    sent = wire.encode(0, bucket)
    assert sent.dtype == dtype
    wire.count(sent)
    assert wire.bytes_sent == 16
    wire.decode(2 * sent, bucket)
    assert torch.equal(bucket, 2 * original.to(dtype).float())


# ---- the reducer on one rank ----------------------------------------------------------------------------------------


class Net(nn.Module):
    """A shared weight, a parameter that is never used, groups of different sizes."""

    def __init__(self) -> None:
        super().__init__()
        self.embeddings = nn.Embedding(11, 6)
        self.layers = nn.ModuleList(nn.Linear(6, 6) for _ in range(3))
        self.unused = nn.Parameter(torch.randn(4))
        self.double()

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        hidden = self.embeddings(ids)
        for layer in self.layers:
            hidden = torch.tanh(layer(hidden))
        return F.linear(hidden, self.embeddings.weight)


def make_net() -> Net:
    torch.manual_seed(4)
    return Net()


def micro_batches() -> list[tuple[torch.Tensor, torch.Tensor]]:
    generator = torch.Generator().manual_seed(5)
    return [
        (torch.randint(0, 11, (9,), generator=generator), torch.randint(0, 11, (9,), generator=generator))
        for _ in range(2)
    ]


def loss_of(net: Net, batch: tuple[torch.Tensor, torch.Tensor], factor: float) -> torch.Tensor:
    return factor * F.cross_entropy(net(batch[0]), batch[1], reduction="sum")


def reducer_of(net: Net, clip: str, max_norm: float, bucket_mb: float = 1e-4) -> BucketReducer:
    named = list(net.named_parameters())
    order = measure_ready_order([p for _, p in named], lambda: loss_of(net, micro_batches()[0], 1.0).backward())
    net.zero_grad(set_to_none=True)
    layout = plan_layout(
        [name for name, _ in named], [p.numel() for _, p in named], order, clip_groups="layer", bucket_mb=bucket_mb,
        whole_groups=clip == "bucket_before_reduce",
    )  # fmt: skip
    return BucketReducer(net, layout, clip=clip, max_norm=max_norm, wire=WireFormat(torch.float64))


def run_reducer(reducer: BucketReducer, net: Net, factor: float, scale: torch.Tensor | None = None) -> torch.Tensor:
    reducer.zero_grad()
    batches = micro_batches()
    for index, batch in enumerate(batches):
        with reducer.micro_batch(index == len(batches) - 1, scale):
            loss = loss_of(net, batch, factor)
            (loss if scale is None else loss * scale).backward()
    return reducer.finish()


def plain_gradients(clip: str, max_norm: float, factor: float) -> tuple[dict[str, torch.Tensor], float]:
    """Gradients after clipping, and the norm that `finish` reports: of the gradient as it comes from the reduction."""
    net = make_net()
    sum(loss_of(net, batch, factor) for batch in micro_batches()).backward()  # type: ignore[union-attr]
    gradients = {name: torch.zeros_like(p) if p.grad is None else p.grad for name, p in net.named_parameters()}

    def norm(names: list[str]) -> float:
        return math.sqrt(sum(gradients[name].square().sum().item() for name in names))

    groups: dict[str, list[str]] = {}
    for name in gradients:
        match = re.match(r"layers\.\d+|\w+", name)
        assert match
        groups.setdefault(match.group() if clip == "bucket_before_reduce" else "all", []).append(name)
    before = norm(list(gradients))
    if clip != "none":
        threshold = max_norm / math.sqrt(len(groups))
        for names in groups.values():
            ratio = min(1.0, threshold / norm(names)) if norm(names) else 1.0
            for name in names:
                gradients[name] = gradients[name] * ratio
    return gradients, before if clip in ("none", "global_after_reduce") else norm(list(gradients))


@pytest.mark.parametrize("scale", [None, 1024.0])
@pytest.mark.parametrize("bucket_mb", [1e-6, 4e-4, 100.0])
@pytest.mark.parametrize("max_norm", [0.3, 1e3])
@pytest.mark.parametrize("clip", CLIP_MODES)
def test_reducer_on_one_rank_equals_autograd_and_plain_clipping(
    clip: str, max_norm: float, bucket_mb: float, scale: float | None
) -> None:
    net = make_net()
    reducer = reducer_of(net, clip, max_norm, bucket_mb)
    for factor in (1.0, 0.1):  # a second step on the same buffers
        norm = run_reducer(reducer, net, factor, None if scale is None else torch.tensor(scale, dtype=torch.float64))
        expected, expected_norm = plain_gradients(clip, max_norm, factor)
        assert norm.item() == pytest.approx(expected_norm, rel=1e-12)
        for name, parameter in net.named_parameters():
            torch.testing.assert_close(parameter.grad, expected[name], rtol=1e-11, atol=1e-14)


def test_the_oracle_clips() -> None:
    """At the small threshold every mode changes the gradient, each in its own way; at the large one none does."""
    small = {clip: plain_gradients(clip, 0.3, 1.0)[0]["layers.1.weight"] for clip in CLIP_MODES}
    large = {clip: plain_gradients(clip, 1e3, 1.0)[0]["layers.1.weight"] for clip in CLIP_MODES}
    assert all(torch.equal(large[clip], large["none"]) for clip in CLIP_MODES)
    assert not torch.equal(small["none"], small["global_before_reduce"])
    assert not torch.allclose(small["bucket_before_reduce"], small["global_before_reduce"], rtol=1e-3)
    torch.testing.assert_close(small["global_before_reduce"], small["global_after_reduce"])


def test_clipped_squares_of_a_rank_stay_below_the_threshold() -> None:
    net = make_net()
    norm = run_reducer(reducer_of(net, "bucket_before_reduce", 0.3), net, 1.0)
    assert norm.item() <= 0.3 * (1 + 1e-12)


@pytest.mark.parametrize("clip", CLIP_MODES)
@pytest.mark.parametrize("bad", [float("inf"), float("nan")])
def test_a_gradient_that_is_not_finite_shows_in_the_norm(clip: str, bad: float) -> None:
    net = make_net()
    reducer = reducer_of(net, clip, 1.0)
    assert not torch.isfinite(run_reducer(reducer, net, bad))
    assert torch.isfinite(run_reducer(reducer, net, 1.0)), "and is gone in the next step"


@pytest.mark.parametrize("clip", CLIP_MODES)
def test_statistics_of_the_reducer(clip: str) -> None:
    net = make_net()
    reducer = reducer_of(net, clip, 0.3)
    for _ in range(2):
        run_reducer(reducer, net, 1.0)
    read = reducer.clip_statistics.read()
    if clip == "bucket_before_reduce":
        assert set(read) == {"embeddings", "layers.0", "layers.1", "layers.2", "unused"}
        assert read["unused"] == {"clipped_share": 0.0, "mean_coefficient": 1.0}
        assert read["embeddings"]["clipped_share"] == 1.0
    elif clip == "none":
        assert read["model"]["clipped_share"] == 0.0
    else:
        assert read["model"]["clipped_share"] == 1.0
        assert 0 < read["model"]["mean_coefficient"] < 1
