"""The reducer on one rank against autograd and clipping as one would write it."""

from __future__ import annotations

import math
import re

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from bert_fast.communication.buckets import measure_ready_order, plan_layout
from bert_fast.communication.reducer import BucketReducer
from bert_fast.communication.wire_format import WireFormat
from bert_fast.config.choices import CLIP_MODES


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
