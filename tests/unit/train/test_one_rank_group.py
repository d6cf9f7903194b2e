"""A run of one rank with a backend named: a process group of one, every collective called, the same weights as without."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch
import torch.distributed as dist

from bert_fast.config import Config
from bert_fast.train.environment import Environment, needs_process_group
from bert_fast.train.setup.build import build
from bert_fast.train.setup.warmup import synthetic_input


@contextmanager
def group_of_one() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        yield
    finally:
        dist.destroy_process_group()


def weights_after(config: Config, environment: Environment) -> tuple[torch.Tensor, int]:
    components = build(config, environment)
    for seed in range(3):
        components.step(synthetic_input(config, environment, seed), 1e-3)
    components.engine.wait_pending()
    flat = torch.cat([p.detach().flatten() for p in components.model.parameters()])
    return flat, components.engine.wire.bytes_sent


@pytest.mark.parametrize(
    "overrides",
    [
        (), ("optimizer.step_per_bucket=true",), ("communication.shard_optimizer=true",), ("optimizer.name=lamb",),
        ("communication.shard_optimizer=true", "optimizer.name=lamb"), ("communication.clip=global_after_reduce",),
    ],
)  # fmt: skip
def test_collectives_of_one_rank_change_nothing(
    make_config: Callable[..., Config], environment: Environment, overrides: tuple[str, ...]
) -> None:
    plain, nothing_sent = weights_after(make_config(*overrides), environment)
    assert nothing_sent == 0
    with group_of_one():
        grouped, sent = weights_after(make_config("communication.backend=gloo", *overrides), environment)
    assert sent > 0
    if "communication.shard_optimizer=true" in overrides:  # norms add up over other pieces
        torch.testing.assert_close(grouped, plain, rtol=1e-5, atol=1e-7)
    else:
        assert torch.equal(grouped, plain)


def test_who_joins_a_process_group(make_config: Callable[..., Config]) -> None:
    assert not needs_process_group(make_config())
    for override in ("communication.backend=gloo", "communication.engine=ddp"):
        assert needs_process_group(make_config(override))
