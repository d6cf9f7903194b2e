"""Layout of gradients: order, clip groups, buckets, places in the flat buffer."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
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
from bert_fast.config import ModelConfig
from bert_fast.errors import UserError
from bert_fast.model.bert import BertForPretraining

MIB = 2**20


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
