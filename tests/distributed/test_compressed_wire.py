"""Lossy wire formats between real ranks: what arrives and what is left add up, all ranks agree, state goes on."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from support.rank_pool import RankPool
from torch import nn

from bert_fast.communication import compressed
from bert_fast.communication.buckets import plan_layout
from bert_fast.communication.powersgd import PowerSgd
from bert_fast.communication.reducer import BucketReducer
from bert_fast.communication.residuals import Residuals
from bert_fast.communication.sharded import ShardedReducer
from bert_fast.communication.wire_format import WireFormat, wire_format
from bert_fast.compression.lowrank import orthogonalize
from bert_fast.config.choices import WIRE_FORMATS

pytestmark = pytest.mark.distributed

Pools = Callable[[int], RankPool]
FORMATS = [
    name for name, choice in WIRE_FORMATS.items() if not choice.is_cast and name not in ("onebit", "zero_one")
]  # which send momentum
BY_NODE = [f"{name} by 2" for name in FORMATS if WIRE_FORMATS[name].by_node]  # in nodes of two ranks
STEPS, SKIPPED = 12, (4, 7)
SIZES = [(64, 48), (48,), (96, 64), (7,), (64, 64), (1000,)]


class Net(nn.Module):
    """Parameters whose gradients are what is given: the gradient of a scalar product."""

    def __init__(self) -> None:
        super().__init__()
        self.weights = nn.ParameterList(nn.Parameter(torch.zeros(size)) for size in SIZES)

    def forward(self, given: list[torch.Tensor]) -> torch.Tensor:
        return torch.stack([(w * g).sum() for w, g in zip(self.weights, given, strict=True)]).sum()


def gradients(rank: int, step: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1000 * step + rank)
    return [torch.randn(size, generator=generator) * 10.0 ** -(number % 3) for number, size in enumerate(SIZES)]


def make(name: str, world: int, sharded: bool = False, **settings: Any) -> tuple[Net, BucketReducer]:
    model = Net()
    numel = [p.numel() for p in model.parameters()]
    layout = plan_layout(
        [n for n, _ in model.named_parameters()], numel, list(range(len(SIZES)))[::-1],
        clip_groups="tensor", bucket_mb=0.03, whole_groups=True, shards=world,
    )  # fmt: skip
    assert len(layout.buckets) > 1
    name, _, node = name.partition(" by ")
    wire = wire_format(name, torch.float32, **settings, **({"ranks_per_node": int(node)} if node else {}))
    kind = ShardedReducer if sharded else BucketReducer
    return model, kind(model, layout, clip="none", max_norm=1.0, wire=wire)


def reduce(model: Net, engine: BucketReducer, step: int, skipped: bool = False) -> np.ndarray:
    """A step's averaged gradient, in the order of parameters; of a rank's shards elsewhere zeros."""
    engine.zero_grad()
    given = gradients(dist.get_rank(), step)
    if skipped and dist.get_rank() == 0:
        given[1] = given[1] * float("inf")
    with engine.micro_batch(True):
        model(given).backward()
    norm = engine.finish()
    assert torch.isfinite(norm) == (not skipped)
    engine.wire.end_step(torch.tensor(float(skipped)))
    return np.concatenate([p.grad.numpy().ravel().copy() for p in model.parameters()])  # type: ignore[union-attr]


def exact(step: int, world: int) -> np.ndarray:
    ranks = [torch.cat([g.ravel() for g in gradients(rank, step)]) for rank in range(world)]
    return torch.stack(ranks).double().mean(dim=0).numpy()


def left_over(wire: WireFormat, layout: Any) -> np.ndarray:
    """What this rank has not sent, in the order of parameters: taken over by residuals that hold nothing."""
    state = wire.state_dict()
    residuals = state["residuals"]
    parts = [residuals] if "held" in residuals else list(residuals.values())
    heir = Residuals(layout, "fp32", torch.device("cpu"))
    heir.take_over(parts)
    flat = torch.cat([heir[number].residual() for number in range(len(layout.buckets))])
    return np.concatenate([flat[o : o + n].numpy() for o, n in zip(layout.offsets, layout.numel, strict=True)])


def run(rank: int, world: int, name: str, restart_at: int | None = None) -> dict[str, Any]:
    model, engine = make(name, world)
    found, sent = [], []
    for step in range(STEPS):
        if step == restart_at:
            state = engine.wire.state_dict()
            model, engine = make(name, world)
            engine.wire.load_state_dict(state)
        engine.reset_counters()
        result = reduce(model, engine, step, step in SKIPPED)
        sent.append(engine.counters()["gradient_bytes"])
        if step not in SKIPPED:
            found.append(result)
    return {"found": np.stack(found), "left": left_over(engine.wire, engine.layout), "sent": sent}


@pytest.mark.parametrize(
    ("name", "world"), [*((name, world) for name in FORMATS for world in (2, 4)), *((name, 4) for name in BY_NODE)]
)
def test_what_arrived_and_what_is_left_are_all_gradients(pool: Pools, name: str, world: int) -> None:
    """Over steps of which two were skipped, as one rank's gradient was not finite."""
    ranks = pool(world).call(run, name)
    for one in ranks:
        np.testing.assert_array_equal(one["found"], ranks[0]["found"])
    truth = np.stack([exact(step, world) for step in range(STEPS) if step not in SKIPPED])
    arrived = ranks[0]["found"].astype(np.float64).sum(axis=0)
    left = sum(one["left"].astype(np.float64) for one in ranks)
    np.testing.assert_allclose(arrived + left, truth.sum(axis=0), atol=2e-5)
    assert np.linalg.norm(ranks[0]["found"][0] - truth[0]) > 1e-4 * np.linalg.norm(truth[0]), "it is lossy"
    assert np.abs(left).max() > 0


def in_micro_batches(rank: int, world: int, name: str, count: int) -> list[np.ndarray]:
    """The averaged gradients of steps whose gradient comes in `count` equal parts."""
    model, engine = make(name, world)
    found = []
    for step in range(4):
        engine.zero_grad()
        for number in range(count):
            with engine.micro_batch(number == count - 1):
                model([g / count for g in gradients(rank, step)]).backward()
        engine.finish()
        engine.wire.end_step(torch.tensor(0.0))
        found.append(np.concatenate([p.grad.numpy().ravel().copy() for p in model.parameters()]))  # type: ignore[union-attr]
    return found


@pytest.mark.parametrize("name", FORMATS)
def test_accumulated_gradients_are_one_message(pool: Pools, name: str) -> None:
    once, twice = (pool(2).call(in_micro_batches, name, count)[0] for count in (1, 2))
    np.testing.assert_array_equal(once, twice)


@pytest.mark.parametrize("name", [*FORMATS, *BY_NODE])
def test_goes_on_from_a_checkpoint_bit_for_bit(pool: Pools, name: str) -> None:
    world = 4 if name in BY_NODE else 2
    straight, resumed = pool(world).call(run, name), pool(world).call(run, name, 5)
    for one, other in zip(straight, resumed, strict=True):
        np.testing.assert_array_equal(one["found"], other["found"])
        np.testing.assert_array_equal(one["left"], other["left"])


def halves(rank: int, world: int, name: str) -> dict[str, Any]:
    """A rank's state after some steps."""
    model, engine = make(name, world)
    total = sum(reduce(model, engine, step).astype(np.float64) for step in range(5))
    return {"arrived": total, "state": engine.wire.state_dict(), "left": left_over(engine.wire, engine.layout)}


def take_over(rank: int, world: int, name: str, states: list[dict[str, Any]]) -> np.ndarray:
    _, engine = make(name, world)
    engine.wire.take_over(states[rank::world], states[0])
    return left_over(engine.wire, engine.layout)


@pytest.mark.parametrize(("before", "after"), [(4, 2), (2, 4), (2, 1)])
@pytest.mark.parametrize("name", [*FORMATS, *BY_NODE])
def test_another_number_of_ranks_takes_over_all_that_was_left(pool: Pools, name: str, before: int, after: int) -> None:
    old = pool(before).call(halves, name)
    new = pool(after).call(take_over, name, [one["state"] for one in old])
    expected = sum(one["left"].astype(np.float64) for one in old)
    np.testing.assert_allclose(sum(one.astype(np.float64) for one in new), expected, atol=1e-6)
    truth = sum(exact(step, before) for step in range(5))
    np.testing.assert_allclose(old[0]["arrived"] + expected, truth, atol=2e-5)


def sent_by_level(rank: int, world: int, name: str) -> tuple[int, int]:
    """Bytes of a step that a rank sends within its node, as if alone on the network, and between nodes."""
    model, engine = make(name, world)
    node = engine.wire._node  # type: ignore[attr-defined]
    levels = {id(node.within): 0, id(node.across): 0}
    compressed_all_to_all, gather = compressed._all_to_all, compressed.start_gather

    def counted_all_to_all(received: torch.Tensor, sent: torch.Tensor, tag: int, group: Any) -> Any:
        levels[id(group)] += sent.numel() * (dist.get_world_size(group) - 1) // dist.get_world_size(group)
        return compressed_all_to_all(received, sent, tag, group)

    def counted_gather(whole: torch.Tensor, tag: int, group: Any) -> Any:
        levels[id(group)] += whole.numel() // dist.get_world_size(group) * (dist.get_world_size(group) - 1)
        return gather(whole, tag, group)

    compressed._all_to_all, compressed.start_gather = counted_all_to_all, counted_gather
    try:
        reduce(model, engine, 0)
    finally:
        compressed._all_to_all, compressed.start_gather = compressed_all_to_all, gather
    return levels[id(node.within)], levels[id(node.across)]


@pytest.mark.parametrize("name", BY_NODE)
def test_a_node_sends_one_message_to_the_others(pool: Pools, name: str) -> None:
    """A half of what leaves a rank at once: of its node's message it sends the part that ranks of its local rank own."""
    for within, across in pool(4).call(sent_by_level, name):
        assert across == within // 2


def sharded(rank: int, world: int, name: str) -> np.ndarray:
    """Sum over steps of the averaged gradient, put together from the ranks' shards, and of what is left."""
    model, engine = make(name, world, sharded=True)
    total = torch.zeros(engine.layout.size, dtype=torch.float64)
    for step in range(STEPS):
        reduce(model, engine, step)
        for number, bucket in enumerate(engine.layout.buckets):
            length = (bucket.end - bucket.start) // world
            first = bucket.start + rank * length
            total[first : first + length] += engine.reduced(number)
    dist.all_reduce(total)
    layout = engine.layout
    arrived = np.concatenate([total[o : o + n].numpy() for o, n in zip(layout.offsets, layout.numel, strict=True)])
    left = torch.from_numpy(left_over(engine.wire, layout)).double()
    dist.all_reduce(left)
    return arrived + left.numpy()


@pytest.mark.parametrize("name", [*(name for name in FORMATS if not WIRE_FORMATS[name].not_sharded), *BY_NODE])
def test_sharded(pool: Pools, name: str) -> None:
    world = 4 if name in BY_NODE else 2
    truth = sum(exact(step, world) for step in range(STEPS))
    np.testing.assert_allclose(pool(world).call(sharded, name)[0], truth, atol=2e-5)


# ---- PowerSGD against torch's hook ------------------------------------------------------------------------------------------

RANK, EXACT_STEPS, HOOK_STEPS = 2, 2, 10


def torchs_powersgd(rank: int, world: int) -> np.ndarray:
    """Averaged gradients by torch's DistributedDataParallel with its PowerSGD hook and one bucket."""
    from torch.distributed.algorithms.ddp_comm_hooks.powerSGD_hook import PowerSGDState, powerSGD_hook
    from torch.nn.parallel import DistributedDataParallel

    model = Net()
    ddp = DistributedDataParallel(model, bucket_cap_mb=1000)
    state = PowerSGDState(
        None, matrix_approximation_rank=RANK, start_powerSGD_iter=EXACT_STEPS, min_compression_rate=1, random_seed=0
    )
    ddp.register_comm_hook(state, powerSGD_hook)
    found = []
    for step in range(HOOK_STEPS):
        ddp.zero_grad()
        ddp(gradients(rank, step)).backward()
        found.append(np.concatenate([p.grad.numpy().ravel().copy() for p in model.parameters()]))  # type: ignore[union-attr]
    return np.stack(found)


def our_powersgd(rank: int, world: int) -> np.ndarray:
    """The same by ours, with one bucket, from the bases that torch's hook begins with."""
    model = Net()
    layout = plan_layout(
        [n for n, _ in model.named_parameters()], [p.numel() for p in model.parameters()], list(range(len(SIZES)))[::-1],
        clip_groups="tensor", bucket_mb=1000, whole_groups=True,
    )  # fmt: skip
    wire = wire_format("powersgd", torch.float32, powersgd_rank=RANK, exact_steps=EXACT_STEPS)
    engine = BucketReducer(model, layout, clip="none", max_norm=1.0, wire=wire)
    assert isinstance(wire, PowerSgd)
    (bucket,) = wire._buckets
    with torch.random.fork_rng():
        torch.manual_seed(np.random.RandomState(0).randint(1_000_000_000))
        # In the order of DDP's bucket: the last parameter first
        shapes = {index: SIZES[index] for index in reversed(range(len(SIZES))) if len(SIZES[index]) == 2}
        bases = {index: torch.randn(shape[1], RANK) for index, shape in shapes.items()}
    bucket.start_from({index: orthogonalize(basis[None])[0] for index, basis in bases.items()})
    return np.stack([reduce(model, engine, step) for step in range(HOOK_STEPS)])


def test_powersgd_with_one_bucket_is_torchs_hook(pool: Pools) -> None:
    theirs, ours = pool(2).call(torchs_powersgd)[0], pool(2).call(our_powersgd)[0]
    for step in range(HOOK_STEPS):
        np.testing.assert_allclose(
            ours[step], theirs[step], atol=2e-6 * np.abs(theirs[step]).max(), err_msg=f"step {step}"
        )
    exact_one = exact(EXACT_STEPS, 2)
    assert np.linalg.norm(theirs[EXACT_STEPS] - exact_one) > 0.1 * np.linalg.norm(exact_one), "the hook has compressed"
