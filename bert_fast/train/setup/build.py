"""Everything a run needs before its clock starts: model, ready order, engine, optimizer, warm-up, ceiling."""

from __future__ import annotations

import copy
import functools
import os
import time
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from bert_fast.communication.buckets import Layout, measure_ready_order, plan_layout
from bert_fast.communication.ddp import REBUILD_STEPS, DdpEngine
from bert_fast.communication.reducer import BucketReducer
from bert_fast.communication.sharded import ShardedReducer
from bert_fast.communication.wire_format import fp16_scale, wire_format
from bert_fast.config import Config
from bert_fast.errors import UserError
from bert_fast.hardware import machine_memory
from bert_fast.memory.estimate import least_bytes
from bert_fast.model.attention import choose_backend
from bert_fast.model.bert import BertForPretraining
from bert_fast.model.checkpoints import load_pretrained
from bert_fast.model.fp8 import check_fp8, use_fp8
from bert_fast.optim.build import build_optimizer
from bert_fast.train.batches import synthetic_batch, to_device
from bert_fast.train.clock import DeviceTimer
from bert_fast.train.collectives import all_gather_json, broadcast_json
from bert_fast.train.cuda_graphs import CudaGraphStep, capture_on_cuda, check_graphs, tensor_rates
from bert_fast.train.environment import Environment
from bert_fast.train.loss_scale import LossScale
from bert_fast.train.setup.bucket_sizes import BucketRecord, measure_need_times, measure_ready_times, plan_buckets
from bert_fast.train.setup.consistency import check_layout, check_parameters
from bert_fast.train.sharded_optimizer import ShardedOptimizer
from bert_fast.train.step import Engine, StepInput, TrainStep


@dataclass
class TrainComponents:
    """The parts of a step, warmed up, weights as at the start."""

    model: BertForPretraining
    engine: Engine
    layout: Layout
    optimizer: torch.optim.Optimizer | ShardedOptimizer
    loss_scale: LossScale | None
    step: TrainStep | CudaGraphStep
    buckets: BucketRecord | None = None


def build(config: Config, environment: Environment) -> TrainComponents:
    """Build and warm up. Touches no data set; weights, optimizer and random state end as if no step had run."""
    model = build_model(config, environment)
    if config.train.cuda_graphs:
        check_graphs(config, environment.device, model.backend)
    if config.train.compile:
        for layer in model.layers:
            layer.compile(dynamic=True)
    check_parameters([(name, list(p.shape)) for name, p in model.named_parameters()], environment)
    order = _shared_ready_order(config, environment, model)
    config, record = _with_buckets(config, environment, model, order)
    layout = make_layout(config, model, order)
    check_layout(layout, model, environment)
    engine = make_engine(config, environment, model, layout)
    optimizer: torch.optim.Optimizer | ShardedOptimizer
    if isinstance(engine, ShardedReducer):
        if config.train.compile:
            torch.compiler.reset()  # what was traced so far does not know the hooks that wait for weights
        optimizer = ShardedOptimizer(engine, list(model.named_parameters()), config.optimizer)
        parts = optimizer.parts()
    else:
        optimizer = build_optimizer(model.named_parameters(), config.optimizer)
        parameters = list(model.parameters())
        parts = [[parameters[i] for i in bucket.parameters] for bucket in layout.buckets]
    loss_scale = LossScale(config.train.loss_scale, environment.device) if environment.dtype == torch.float16 else None
    inner = optimizer.inner if isinstance(optimizer, ShardedOptimizer) else optimizer
    step = TrainStep(engine, inner, environment.device, environment.dtype, environment.world_size, loss_scale)
    if config.optimizer.step_per_bucket:
        step.update_by_bucket(parts)
    machinery = TrainComponents(model, engine, layout, optimizer, loss_scale, step, record)
    _warm_up(config, environment, machinery)
    if config.train.cuda_graphs:
        tensor_rates(inner, environment.device)
        machinery.step = CudaGraphStep(step, config.data.max_seq_len, capture_on_cuda, DeviceTimer())
    seed_ranks(config.train.seed, environment)
    return machinery


def build_model(config: Config, environment: Environment) -> BertForPretraining:
    """The model on its device, with the config's starting weights; the same on every rank.

    Raises:
        UserError: it cannot fit the device's memory, or its checkpoint does not fit it.
    """
    check_memory(config, environment.device)
    shape = config.model
    backend = choose_backend(shape.attention_backend, environment.device, environment.dtype, shape.attention_dropout)
    torch.manual_seed(config.train.seed)
    with environment.device:  # 336 million random numbers take a CPU seconds
        model = BertForPretraining(shape, backend)
    if config.checkpoint.init_from:
        load_pretrained(model, shape, config.checkpoint.init_from)
    if config.train.precision == "fp8":
        check_fp8(environment.device, config.batch.shape_multiple)
        use_fp8(model)
    return model


def check_memory(config: Config, device: torch.device) -> None:
    """Refuse what cannot fit before an allocator does, or the system kills what it likes. Raises UserError."""
    if device.type == "cuda":
        there, ranks, what = torch.cuda.get_device_properties(device).total_memory, 1, str(device)
    else:
        ranks = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
        there, what = machine_memory(), "this machine"
    needed = ranks * least_bytes(config)
    if needed > there:
        shape = config.model
        raise UserError(
            f"model.vocab_size={shape.vocab_size}, hidden_size={shape.hidden_size}, num_layers={shape.num_layers}, "
            f"intermediate_size={shape.intermediate_size} with batch.micro_batch_size={config.batch.micro_batch_size} need at least "
            f"{needed / 2**30:,.1f} GiB for {ranks} rank(s), and {what} has {there / 2**30:,.1f}; make one of them smaller"
        )


def make_engine(config: Config, environment: Environment, model: torch.nn.Module, layout: Layout) -> Engine:
    """The communication engine of the config. One rank without a process group has nothing to shard."""
    communication = config.communication
    kind = DdpEngine if communication.engine == "ddp" else BucketReducer
    if communication.shard_optimizer and dist.is_initialized():
        if environment.device.type == "cuda" and dist.get_backend() == "gloo":
            raise UserError("communication.shard_optimizer on CUDA needs NCCL; set communication.backend=nccl or auto")
        kind = ShardedReducer
    scale = fp16_scale(communication.clip, communication.max_norm, environment.dtype == torch.float16)
    wire = wire_format(communication.reduce_dtype, next(model.parameters()).dtype, scale)
    return kind(model, layout, clip=communication.clip, max_norm=communication.max_norm, wire=wire)


def make_layout(config: Config, model: torch.nn.Module, ready_order: list[int]) -> Layout:
    """Clip groups and buckets of the config over a model (`auto` is planned before)."""
    assert config.communication.bucket_mb != "auto"
    named = list(model.named_parameters())
    return plan_layout(
        [name for name, _ in named], [p.numel() for _, p in named], ready_order,
        clip_groups=config.communication.clip_groups, bucket_mb=config.communication.bucket_mb,
        whole_groups=config.communication.clip == "bucket_before_reduce",
        shards=config.system.world_size if config.communication.shard_optimizer else 1,
    )  # fmt: skip


def bucket_note(config: Config, layout: Layout) -> str | None:
    """What to say of a list of bucket sizes that is not as long as the model has buckets."""
    sizes, count = config.communication.bucket_mb, len(layout.buckets)
    if not isinstance(sizes, list) or len(sizes) == count:
        return None
    if len(sizes) < count:
        return f"communication.bucket_mb lists {len(sizes)} sizes and the model fills {count} buckets: the last size repeats"
    return (
        f"communication.bucket_mb lists {len(sizes)} sizes and the model fills {count} buckets: the others are not used"
    )


def seed_ranks(seed: int, environment: Environment) -> None:
    """Each rank its own dropout. Torch takes 64 bits, so large seeds wrap around."""
    torch.manual_seed((seed * 100_003 + environment.rank) % 2**64)


def synthetic_input(config: Config, environment: Environment, seed: int) -> StepInput:
    """Made-up batches of a rank, as long as the config allows; the same for the same seed."""
    batches = [
        synthetic_batch(config.batch.micro_batch_size, config.data.max_seq_len, config.model.vocab_size, seed + i)
        for i in range(config.batch.gradient_accumulation_steps)
    ]
    masked = sum(len(b.masked_labels) for b in batches) * environment.world_size
    inputs = [to_device(b, environment.device, config.batch.shape_multiple) for b in batches]
    return StepInput(inputs, masked, config.batch.global_batch_size)


def _synthetic_loss(config: Config, environment: Environment, model: BertForPretraining) -> torch.Tensor:
    inputs = synthetic_input(config, environment, seed=0)
    with torch.autocast(environment.device.type, environment.dtype, enabled=environment.autocast):
        losses = model(inputs.micro_batches[0])
    return losses.mlm_sum + losses.nsp_sum


def _shared_ready_order(config: Config, environment: Environment, model: BertForPretraining) -> list[int]:
    """Rank 0's measured order, the same on all ranks."""
    parameters = list(model.parameters())
    measured = measure_ready_order(parameters, lambda: _synthetic_loss(config, environment, model).backward())
    order = torch.tensor(measured, device=environment.device)
    if dist.is_initialized():
        dist.broadcast(order, 0)
    model.zero_grad(set_to_none=True)
    return order.tolist()


def _with_buckets(
    config: Config, environment: Environment, model: BertForPretraining, order: list[int]
) -> tuple[Config, BucketRecord | None]:
    """The config with its buckets planned, if it leaves that to us."""
    communication = config.communication
    if communication.bucket_mb != "auto":
        return config, None
    parameters = list(model.parameters())
    wire = wire_format(communication.reduce_dtype, parameters[0].dtype).dtype
    forward = functools.partial(_synthetic_loss, config, environment, model)
    ready = measure_ready_times(parameters, forward, environment)
    needed = measure_need_times(model, forward, environment) if communication.shard_optimizer else None
    any_buckets = make_layout(_with_bucket_mb(config, 25.0), model, order)
    record = plan_buckets(any_buckets, ready, communication, wire, environment, needed)
    return _with_bucket_mb(config, record.bucket_mb(wire_bytes=wire.itemsize)), record


def _with_bucket_mb(config: Config, bucket_mb: float | list[float]) -> Config:
    communication = config.communication.model_copy(update={"bucket_mb": bucket_mb})
    return config.model_copy(update={"communication": communication})


def _warm_up(config: Config, environment: Environment, machinery: TrainComponents) -> None:
    """Synthetic steps: communicator, kernels, allocator, DDP's bucket plan. Everything is put back afterwards."""
    model = machinery.model
    steps = config.train.warmup_batches
    if config.communication.engine == "ddp":
        steps = max(steps, REBUILD_STEPS)
    if not steps:
        return
    before = [p.detach().clone() for p in model.parameters()]
    wire_before = copy.deepcopy(machinery.engine.wire.state_dict())
    scale_before = machinery.loss_scale.state_dict() if machinery.loss_scale else None
    for index in range(steps):
        machinery.step(synthetic_input(config, environment, seed=index), lr=0.0)
    machinery.engine.wait_pending()
    with torch.no_grad():
        for parameter, value in zip(model.parameters(), before, strict=True):
            parameter.copy_(value)
    machinery.step.optimizer.state.clear()
    if machinery.loss_scale and scale_before:
        machinery.loss_scale.load_state_dict(scale_before)
    for timer in (machinery.step.compute_timer, machinery.step.exposed_timer):
        if timer is not None:
            timer.clear()
    clip_statistics = machinery.engine.clip_statistics
    clip_statistics.read()
    machinery.engine.wire.load_state_dict(wire_before)
    machinery.engine.wire.bytes_sent = 0
    if isinstance(machinery.engine, ShardedReducer):
        machinery.engine.weight_bytes_sent = 0


def matmul_peak(environment: Environment, seconds: float = 0.3) -> float:
    """Best measured matmul rate of this rank in FLOP/s, all ranks measuring at once, in the run's format."""
    cuda = environment.device.type == "cuda"
    size = 8192 if cuda else 1024
    own = torch.Generator(environment.device).manual_seed(0)  # the run's random numbers are not touched
    a, b = (torch.randn(size, size, generator=own, device=environment.device).to(environment.dtype) for _ in range(2))
    if dist.is_initialized():
        dist.barrier()
    best = 0.0
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        start = time.perf_counter()
        a @ b
        if cuda:
            torch.cuda.synchronize()
        best = max(best, 2 * size**3 / (time.perf_counter() - start))
    return best


def broadcast_value(value: Any, rank: int = 0) -> Any:
    """A rank's `value` (plain, as JSON), on every rank. A collective."""
    return broadcast_json(value, rank) if dist.is_initialized() else value


def gather_values(value: Any) -> list[Any]:
    """Every rank's `value` (plain, as JSON), on every rank. A collective."""
    return all_gather_json(value) if dist.is_initialized() else [value]


def gather_floats(values: list[float], environment: Environment) -> np.ndarray:
    """Every rank's `values`, float64 [ranks, len(values)], on every rank. A collective."""
    mine = torch.tensor(values, dtype=torch.float64, device=environment.device)
    if not dist.is_initialized():
        return mine.cpu().numpy()[None]
    everyone = [torch.empty_like(mine) for _ in range(environment.world_size)]
    dist.all_gather(everyone, mine)
    return torch.stack(everyone).cpu().numpy()
