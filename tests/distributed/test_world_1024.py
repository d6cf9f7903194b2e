"""1,024 ranks in one process: torch's fake process group answers every collective at once and leaves tensors alone.

So what is tested is one rank's side: what it launches, when, from which memory, and that it divides by 1,024.
"""

from __future__ import annotations

import math
import resource
import time
from collections.abc import Callable, Iterator
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist

from bert_fast.balance.lengths import wikipedia_like
from bert_fast.balance.planner import Plan
from bert_fast.communication.buckets import measure_ready_order
from bert_fast.communication.reducer import BucketReducer
from bert_fast.communication.wire_format import fp16_scale, wire_format
from bert_fast.config import Config
from bert_fast.config.choices import CLIP_MODES
from bert_fast.config.load import config_from_tree
from bert_fast.data.samples import Sample
from bert_fast.data.store import merge_parts, write_part
from bert_fast.model.bert import BertForPretraining, BertInput
from bert_fast.train.batches import batch_of_lengths, plan_step, synthetic_batch, to_device
from bert_fast.train.context import open_context
from bert_fast.train.environment import Environment
from bert_fast.train.evaluate import Evaluator
from bert_fast.train.run import open_data, prepare
from bert_fast.train.setup.build import build, build_model, make_layout
from bert_fast.train.setup.cost_model import make_planner
from bert_fast.train.step import StepInput

pytestmark = pytest.mark.distributed

WORLD = 1024
RANKS = (0, 1, 517, 1023)
CPU = torch.device("cpu")
_TIMEOUT_S = 120.0


def make_config(**communication: Any) -> Config:
    """A BERT of many tensors: 24 layers deep and narrow."""
    return config_from_tree({
        "run": {"tensorboard": False, "measure_peak_flops": False},
        "model": {
            "vocab_size": 120, "hidden_size": 16, "num_layers": 24, "num_heads": 2, "intermediate_size": 32,
            "max_positions": 32, "hidden_dropout": 0.0, "attention_dropout": 0.0, "initializer_range": 0.1,
        },
        "data": {"train": "unused", "max_seq_len": 32},
        "batch": {"global_batch_size": 4 * 2 * WORLD, "micro_batch_size": 4, "gradient_accumulation_steps": 2},
        "communication": {"bucket_mb": 0.01, **communication},
        "optimizer": {"name": "lamb", "lr": 0.01},
        "schedule": {"total_steps": 100},
        "train": {"precision": "fp32", "max_steps": 10, "warmup_batches": 1},
        "evaluation": {"data": "unused", "every_samples": 10**6},
        "system": {"world_size": WORLD, "ranks_per_node": 8, "device": "cpu", "threads_per_rank": 1},
    })  # fmt: skip


# ---- a process that is one of 1,024 ---------------------------------------------------------------------------------


def as_rank(rank: int, function: Callable[..., Any], *arguments: Any) -> Any:
    """What `function(*arguments)` returns in a process of its own that believes to be `rank`: no group leaks from it."""
    context = get_context("forkserver")
    context.set_forkserver_preload(["torch", "torch.distributed", "torch._dynamo", "bert_fast.train.setup.build"])
    ours, theirs = context.Pipe()
    process = context.Process(target=_join_and_call, args=(rank, theirs, function, arguments), daemon=True)
    process.start()
    theirs.close()
    try:
        assert ours.poll(_TIMEOUT_S), f"rank {rank} hangs"
        return ours.recv()
    finally:
        process.kill()
        process.join()
        ours.close()


def _join_and_call(rank: int, pipe: Connection, function: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    from torch.testing._internal.distributed.fake_pg import FakeStore

    torch.set_num_threads(1)
    torch.manual_seed(rank)  # nothing that ranks must share may come from here
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=WORLD)
    pipe.send(function(*arguments))


# ---- what one rank launches -----------------------------------------------------------------------------------------


def batch_of(config: Config, seed: int) -> BertInput:
    return to_device(synthetic_batch(4, config.data.max_seq_len, config.model.vocab_size, seed), CPU)


def loss_of(model: BertForPretraining, batch: BertInput) -> torch.Tensor:
    losses = model(batch)
    return losses.mlm_sum + losses.nsp_sum


def reducer_step(config: Config, accumulation: int, loss_scale: float | None = None) -> dict[str, Any]:
    """One step of a reducer: every all-reduce with the place of its memory, and what was ready by then."""
    environment = Environment(dist.get_rank(), 0, WORLD, CPU, torch.float32)
    model = build_model(config, environment)
    parameters = list(model.parameters())
    batches = [batch_of(config, seed) for seed in range(accumulation)]
    order = measure_ready_order(parameters, lambda: loss_of(model, batches[0]).backward())
    model.zero_grad(set_to_none=True)
    communication = config.communication
    wire_scale = fp16_scale(communication.clip, communication.max_norm, loss_scale is not None)
    reducer = BucketReducer(
        model, make_layout(config, model, order), clip=communication.clip, max_norm=communication.max_norm,
        wire=wire_format(communication.reduce_dtype, torch.float32, wire_scale),
    )  # fmt: skip
    assert dist.get_world_size() == WORLD
    buffer = reducer.gradients.buffer
    phase, ready, launches = "before", [0], []
    real = dist.all_reduce

    def counting(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        inside = tensor.untyped_storage().data_ptr() == buffer.untyped_storage().data_ptr()
        launches.append((phase, ready[0], tensor.storage_offset() if inside else -1, tensor.numel(), str(tensor.dtype)))
        return real(tensor, *args, **kwargs)

    def one_more(_parameter: torch.Tensor) -> None:
        ready[0] += 1

    for parameter in parameters:
        parameter.register_post_accumulate_grad_hook(one_more)
    dist.all_reduce = counting
    reducer.zero_grad()
    scale = None if loss_scale is None else torch.tensor(loss_scale)
    for number, batch in enumerate(batches):
        last = number == accumulation - 1
        phase, ready[0] = "last backward" if last else "earlier backward", 0
        with reducer.micro_batch(last, scale):
            loss = loss_of(model, batch)
            (loss if scale is None else loss * scale).backward()
    phase = "finish"
    norm = reducer.finish()
    dist.all_reduce = real
    storages = {p.grad.untyped_storage().data_ptr() for p in parameters}
    return {
        "launches": launches, "norm": norm.item(), "order": order, "layout": reducer.layout, "bytes": reducer.wire.bytes_sent,
        "one_storage": storages == {buffer.untyped_storage().data_ptr()},
        "storage_bytes": buffer.untyped_storage().nbytes(),
        "places": [p.grad.storage_offset() for p in parameters], "contiguous": all(p.grad.is_contiguous() for p in parameters),
        "gradient": np.concatenate([p.grad.numpy().ravel() for p in parameters]),
    }  # fmt: skip


@pytest.fixture(scope="module")
def local_gradient() -> np.ndarray:
    """A rank's own gradient of two micro-batches, by autograd alone, in fp64."""
    config = make_config()
    model = build_model(config, Environment(0, 0, 1, CPU, torch.float32)).double()
    for seed in range(2):
        loss_of(model, batch_of(config, seed)).backward()
    return np.concatenate([p.grad.numpy().ravel() for p in model.parameters()])


@pytest.mark.parametrize("clip", CLIP_MODES)
def test_every_bucket_leaves_once_in_order_from_one_buffer(local_gradient: np.ndarray, clip: str) -> None:
    """During backward, but where the whole gradient must be known first; no second copy of the gradients is made."""
    threshold = {} if clip == "none" else {"max_norm": 1e9}
    got = as_rank(517, reducer_step, make_config(clip=clip, **threshold), 2)
    layout = got["layout"]
    num_tensors = len(layout.ordering.names)
    assert num_tensors > 250
    assert len(layout.buckets) > 10
    assert [(start, start + numel) for _, _, start, numel, _ in got["launches"]] == [
        (bucket.start, bucket.end) for bucket in layout.buckets
    ]
    assert {dtype for *_, dtype in got["launches"]} == {"torch.float32"}
    assert got["bytes"] == 4 * layout.size
    phases = {phase for phase, *_ in got["launches"]}
    if clip == "global_before_reduce":
        assert phases == {"finish"}
    else:
        assert phases == {"last backward"}
        complete = np.cumsum([len(bucket.parameters) for bucket in layout.buckets])
        ready = np.array([ready for _, ready, *_ in got["launches"]])
        assert (ready >= complete - 1).all(), "the reducer's hook runs before the one that counts"
        assert ready[0] < num_tensors / 4, "the first leaves early"
        assert (np.diff(ready) > 0).all()
    assert got["one_storage"]
    assert got["contiguous"]
    assert got["storage_bytes"] == 4 * layout.size
    assert got["places"] == list(layout.offsets)
    assert layout.size < sum(layout.numel) + 16 * num_tensors
    largest = np.abs(local_gradient).max() / WORLD
    np.testing.assert_allclose(got["gradient"], local_gradient / WORLD, rtol=0, atol=1e-5 * largest)
    assert got["norm"] == pytest.approx(np.linalg.norm(local_gradient) / WORLD, rel=1e-5)


def test_all_ranks_lay_out_and_launch_the_same() -> None:
    """Though each has measured its own ready order and has a random state of its own."""
    results = [as_rank(rank, reducer_step, make_config(), 1) for rank in RANKS]
    for result in results[1:]:
        assert result["order"] == results[0]["order"]
        assert result["layout"] == results[0]["layout"]
        assert [launch[2:] for launch in result["launches"]] == [launch[2:] for launch in results[0]["launches"]]


# ---- half precision on the wire -------------------------------------------------------------------------------------

LIKE_BERT_LARGE = math.sqrt(56_602 / 335e6)  # max_norm at which this model's clipped entries are as small as that one's


@pytest.mark.parametrize(
    ("reduce_dtype", "loss_scale", "bound"),
    [
        ("bf16", None, 2**-8),
        ("fp16", 65536.0, 2**-10),
        ("fp16", None, 2**-10),
    ],
)  # fmt: skip
def test_small_entries_survive_a_half_precision_wire(reduce_dtype: str, loss_scale: float | None, bound: float) -> None:
    """Entries of a rank's share of the average, which the wire carries; relative error of the whole gradient."""
    exact, half = (
        as_rank(1, reducer_step, make_config(max_norm=LIKE_BERT_LARGE, reduce_dtype=name), 1, scale)
        for name, scale in (("fp32", None), (reduce_dtype, loss_scale))
    )
    assert exact["norm"] * WORLD == pytest.approx(LIKE_BERT_LARGE, rel=0.2), "clipped, nearly every group"
    assert half["bytes"] * 2 == exact["bytes"]
    gap = np.linalg.norm(half["gradient"] - exact["gradient"]) / np.linalg.norm(exact["gradient"])
    assert gap < bound


# ---- a whole step, on a planned batch -------------------------------------------------------------------------------


def planned_step(config: Config) -> dict[str, Any]:
    """Build as a run does, plan a step for all ranks, and run this rank's share of it."""
    rank = dist.get_rank()
    components = build(config, Environment(rank, rank % 8, WORLD, CPU, torch.float32))
    lengths = np.maximum(2, wikipedia_like(100_000) // 16)  # up to the 32 of the config
    plan: Plan = make_planner(config, lengths).plan(3)
    rng = np.random.default_rng(0)
    batches = [
        batch_of_lengths(lengths[plan.ids[part]], config.model.vocab_size, rng) for part in plan.micro_batches(rank)
    ]
    inputs = StepInput(
        [to_device(b, CPU) for b in batches], 5 * config.batch.global_batch_size, config.batch.global_batch_size
    )
    before = torch.cat([p.detach().ravel() for p in components.model.parameters()])
    result = components.step(inputs, lr=0.01)
    after = torch.cat([p.detach().ravel() for p in components.model.parameters()])
    return {
        "plan": np.concatenate([plan.ids, plan.starts]), "imbalance": plan.imbalance,
        "mine": plan.of_rank(rank), "layout": components.engine.layout, "norm": result.grad_norm.item(),
        "finite": bool(result.is_finite), "moved": (after - before).abs().max().item(),
        "bytes": components.engine.wire.bytes_sent,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("engine", "step_per_bucket", "strategy"),
    [("bucketed", False, "balanced"), ("bucketed", True, "balanced_free"), ("ddp", False, "balanced")],
)
def test_a_planned_step(engine: str, step_per_bucket: bool, strategy: str) -> None:
    """Balance plan, bucket layout and step fit together: every rank has its own samples of one and the same plan."""
    tree = make_config(engine=engine).model_dump()
    tree["balance"]["strategy"], tree["optimizer"]["step_per_bucket"] = strategy, step_per_bucket
    config = config_from_tree(tree)
    results = [as_rank(rank, planned_step, config) for rank in (0, 1023)]
    first, last = results
    np.testing.assert_array_equal(first["plan"], last["plan"])
    assert len(np.unique(first["plan"][: config.batch.global_batch_size])) == config.batch.global_batch_size
    assert not set(first["mine"]) & set(last["mine"])
    assert first["imbalance"] < 1.1
    assert first["layout"] == last["layout"]
    for result in results:
        assert result["finite"]
        assert 0 < result["norm"] <= config.communication.max_norm / WORLD * (1 + 1e-5)  # the other ranks add nothing
        assert 0 < result["moved"] < math.inf
        assert result["bytes"] >= 4 * sum(result["layout"].numel)


# ---- from the rendezvous to the first batch -------------------------------------------------------------------------


def write_large_store(folder: Path, samples: int) -> None:
    """Random sentence pairs of Wikipedia-like lengths up to 32 tokens."""
    rng = np.random.default_rng(samples)
    lengths = np.maximum(5, wikipedia_like(samples) // 16)

    def made() -> Iterator[Sample]:
        for length in lengths:
            masked = np.sort(rng.permutation(int(length))[: max(1, int(length) // 7)]).astype(np.uint16)
            ids, labels = (rng.integers(0, 120, n).astype(np.uint16) for n in (length, len(masked)))
            yield Sample(ids, int(length) // 2, masked, labels, int(rng.integers(2)))

    part = write_part(folder / "part", made())
    merge_parts(folder, [part], {"vocab_size": 120, "vocab_sha256": "0" * 64})


def start_up(config: Config, rank: int) -> dict[str, Any]:
    """All that a run does up to its first step, and its share of an evaluation: no collective brings anything."""
    environment = Environment(rank, rank % 8, WORLD, CPU, torch.float32)
    context = open_context(config, environment, resume=False, on_lost=print)
    began, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    prepared = prepare(context, time.time())
    ready = time.perf_counter()
    context.clock.start()
    data = open_data(context, prepared)
    planner = make_planner(config, data.store.lengths, prepared.cost, data.store.manifest["max_length"])
    planned = plan_step(data.store, planner.plan(0), rank, config)
    first = time.perf_counter()
    evaluator = Evaluator(data.eval_store, config.evaluation, config.batch.shape_multiple, prepared.cost, environment)
    data.scrubber.close()
    return {
        "ids": planned.plan.of_rank(rank), "masked": planned.num_masked, "tokens": planned.num_tokens,
        "hosts": len(context.heartbeat.hosts),
        "evaluated": sum(len(batch.next_sentence_labels) for batch in evaluator.batches),
        "prepare_s": ready - began, "data_s": first - ready,
        "grown_mib": (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024,
    }  # fmt: skip


def test_the_start_of_a_run_as_any_of_1024_ranks(tmp_path: Path) -> None:
    """Build, data, plan, first batch, shard of the evaluation. The same plan everywhere, different samples, little memory."""
    samples = 3 * 8 * WORLD
    for split, count in (("train", samples), ("eval", 3000)):
        write_large_store(tmp_path / split, count)
    tree = make_config().model_dump()
    tree["data"] |= {"train": str(tmp_path / "train")}
    tree["evaluation"] |= {"data": str(tmp_path / "eval")}
    tree["run"] |= {"folder": str(tmp_path / "run")}
    config = config_from_tree(tree)
    (tmp_path / "run").mkdir()
    results = {rank: as_rank(rank, start_up, config, rank) for rank in (0, 517, 1023)}
    ids = [each["ids"] for each in results.values()]
    assert all(len(one) == 8 for one in ids)
    assert len(np.unique(np.concatenate(ids))) == 24
    assert len({(each["masked"], each["tokens"]) for each in results.values()}) == 1
    assert {each["evaluated"] for each in results.values()} <= {2, 3}
    for each in results.values():
        assert each["grown_mib"] < 200, "tables of the store and of the plan; the model is small"
    for rank, each in results.items():  # docs/cluster.md states them: pytest -s
        print(f"rank {rank}: {each['prepare_s']:.2f} s, {each['data_s']:.2f} s, {each['grown_mib']:.0f} MiB")
