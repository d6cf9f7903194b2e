"""The interface of wire formats carries a lossy scheme: own state, warm-up, two collectives a bucket in one order."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from support.rank_pool import RankPool
from torch import nn

from bert_fast.communication.buckets import plan_layout
from bert_fast.communication.reducer import BucketReducer
from bert_fast.communication.wire_format import WireFormat

pytestmark = pytest.mark.distributed

Pools = Callable[[int], RankPool]
WIDTH, LAYERS, STEPS, WARM_UP = 16, 5, 30, 2


class RankOne(WireFormat):
    """Gradients as a matrix of rank one with error feedback (one power iteration), after some exact steps."""

    stages = 2

    def __init__(self) -> None:
        super().__init__(torch.float32)
        self.calls: dict[int, int] = {}
        self.errors: dict[int, torch.Tensor] = {}
        self.collectives: list[tuple[int, str]] = []

    def encode(self, number: int, values: torch.Tensor) -> torch.Tensor:
        self.calls[number] = self.calls.get(number, 0) + 1
        if number in self.errors:
            values += self.errors[number]
        return values

    def all_reduce(
        self, number: int, wire: torch.Tensor, values: torch.Tensor, group: dist.ProcessGroup | None
    ) -> Iterator[dist.Work]:
        if self.calls[number] <= WARM_UP:
            self.collectives.append((number, "exact"))
            yield from super().all_reduce(number, wire, values, group)
            return
        matrix = values.view(WIDTH, -1)
        right = torch.linspace(1, 2, matrix.shape[1])
        for _ in range(self.calls[number] % 7):  # another direction in every step, the same on all ranks
            right = right.roll(1) * torch.linspace(-1, 1, matrix.shape[1])
        left = matrix @ (right / right.norm())
        self.collectives.append((number, "left"))
        self.count(left)
        yield dist.all_reduce(left, group=group, async_op=True)
        left /= left.norm().clamp_min(1e-12)
        local = left @ matrix
        total = local.clone()
        self.collectives.append((number, "right"))
        self.count(total)
        yield dist.all_reduce(total, group=group, async_op=True)
        self.errors[number] = (matrix - torch.outer(left, local)).ravel().clone()
        matrix.copy_(torch.outer(left, total))

    def state_dict(self) -> dict[str, Any]:
        return {"errors": {number: e.clone() for number, e in self.errors.items()}, "calls": dict(self.calls)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.errors, self.calls = dict(state["errors"]), dict(state["calls"])


class Slow(torch.autograd.Function):
    """Backward that takes a while, another one on every rank and in every layer."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, seconds: float) -> torch.Tensor:
        ctx.seconds = seconds
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:  # type: ignore[override]
        time.sleep(ctx.seconds)
        return gradient, None


class Net(nn.Module):
    def __init__(self, seed: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(LAYERS))
        self.delays = random.Random(seed)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = Slow.apply(layer(x), self.delays.random() * 4e-3)
        return x.square().sum()


def run(rank: int, world: int, restart_at: int | None = None) -> dict[str, Any]:
    """Sums over steps of what came out and of the exact average, per parameter; and the order of collectives."""
    torch.manual_seed(0)
    model = Net(rank)
    names, numel = [n for n, _ in model.named_parameters()], [p.numel() for p in model.parameters()]
    layout = plan_layout(
        names, numel, list(range(LAYERS))[::-1], clip_groups="tensor", bucket_mb=1e-6, whole_groups=True
    )
    wire = RankOne()
    engine = BucketReducer(model, layout, clip="none", max_norm=1.0, wire=wire)
    generator = torch.Generator().manual_seed(rank)
    data = [torch.randn(8, WIDTH, generator=generator) for _ in range(4)]
    found, exact, order, sent = [], [], [], []
    for step in range(STEPS):
        if step == restart_at:
            state = wire.state_dict()
            engine.wire = wire = RankOne()
            wire.load_state_dict(state)
        x = data[step % 4]
        truth = torch.cat([g.ravel() for g in torch.autograd.grad(model(x), list(model.parameters()))]) / world
        dist.all_reduce(truth)
        before = wire.bytes_sent
        wire.collectives.clear()
        engine.zero_grad()
        with engine.micro_batch(True):
            model(x).backward()
        engine.finish()
        sent.append(wire.bytes_sent - before)
        order.append(list(wire.collectives))
        found.append(torch.cat([p.grad.ravel() for p in model.parameters()]).numpy().copy())  # type: ignore[union-attr]
        exact.append(truth.numpy().copy())
    return {"found": np.stack(found), "exact": np.stack(exact), "order": order, "sent": sent}


def test_a_lossy_scheme_of_two_collectives(pool: Pools) -> None:
    ranks = pool(2).call(run)
    for one in ranks:
        np.testing.assert_array_equal(one["found"], ranks[0]["found"])
        assert one["order"] == ranks[0]["order"], "the same order, though their backward passes run at different speeds"
    one = ranks[0]
    np.testing.assert_allclose(one["found"][:WARM_UP], one["exact"][:WARM_UP], rtol=1e-5, atol=1e-5)
    assert one["order"][0] == [(number, "exact") for number in range(LAYERS)]
    expected = [(0, "left")]
    for number in range(1, LAYERS):
        expected += [(number, "left"), (number - 1, "right")]
    assert one["order"][-1] == [*expected, (LAYERS - 1, "right")]
    assert one["sent"][0] == LAYERS * WIDTH * WIDTH * 4
    assert one["sent"][-1] == LAYERS * 2 * WIDTH * 4
    single = np.linalg.norm(one["found"][-1] - one["exact"][-1]) / np.linalg.norm(one["exact"][-1])
    total, truth = one["found"].sum(axis=0), one["exact"].sum(axis=0)
    assert single > 0.1, "lossy"
    assert np.linalg.norm(total - truth) / np.linalg.norm(truth) < single / 2, "error feedback makes up for it"


def test_its_state_goes_through_a_checkpoint(pool: Pools) -> None:
    whole, cut = pool(2).call(run), pool(2).call(run, 10)
    np.testing.assert_array_equal(cut[1]["found"], whole[1]["found"])
