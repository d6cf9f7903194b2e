"""From a config to the components of a step: model, layout of gradients, engine, optimizer, step; then the warm-up."""

from __future__ import annotations

import os
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from bert_fast.communication.bucket_record import BucketRecord, ends_of_record
from bert_fast.communication.buckets import (
    GradientLayout,
    Ordering,
    bucket_ends,
    lay_out,
    measure_ready_order,
    order_gradients,
)
from bert_fast.communication.engine import Engine
from bert_fast.communication.onebit import OneBit
from bert_fast.communication.wire_format import WireFormat, fp16_scale, wire_format
from bert_fast.communication.zero_one import ZeroOne
from bert_fast.config import Config
from bert_fast.config.choices import (
    CLIP_MODES,
    ENGINES,
    OBJECTIVES,
    OPTIMIZERS,
    SHARDED_ENGINES,
    WIRE_FORMATS,
    attribute,
    find,
)
from bert_fast.config.root import offloads_nothing
from bert_fast.errors import UserError
from bert_fast.hardware import machine_memory
from bert_fast.memory.estimate import least_bytes, optimizer_bytes
from bert_fast.memory.state import num_shards
from bert_fast.model.attention import choose_backend
from bert_fast.model.bert import BertForPretraining, expected_ready_order
from bert_fast.model.checkpoints import load_pretrained
from bert_fast.model.fp8 import check_fp8, use_fp8
from bert_fast.model.objective import Objective
from bert_fast.optim.averaging import build_average
from bert_fast.optim.build import RunOptimizer
from bert_fast.optim.onebit import TakesMomentum
from bert_fast.optim.zero_one import ZeroOneAdam
from bert_fast.train.clock import DeviceTimer
from bert_fast.train.collectives import broadcast_numbers
from bert_fast.train.components import TrainComponents
from bert_fast.train.cuda_graphs import CudaGraphStep, capture_on_cuda, check_graphs, tensor_rates
from bert_fast.train.environment import Environment, seed_ranks
from bert_fast.train.loss_scale import LossScale
from bert_fast.train.rank_optimizer import RankOptimizer
from bert_fast.train.setup.bucket_sizes import measure_and_plan
from bert_fast.train.setup.consistency import check_layout, check_parameters
from bert_fast.train.setup.recomputation import set_up_recomputation
from bert_fast.train.setup.warmup import synthetic_loss, warm_up
from bert_fast.train.step import TrainStep


def build(config: Config, environment: Environment, planned: dict[str, Any] | None = None) -> TrainComponents:
    """Build and warm up. Touches no data set; weights, optimizer and random state end as if no step had run. A collective.

    Args:
        planned: the buckets.json of this run, where it is resumed: with `communication.bucket_mb: auto` it keeps its buckets,
            as sums over other buckets may be rounded differently.

    Raises:
        UserError: the model does not fit the device or its checkpoint, or ranks differ.
    """
    model = build_model(config, environment)
    if config.train.cuda_graphs:
        check_graphs(config, environment.device, model.backend)
    if config.train.compile:
        for layer in model.encoder_layers:
            layer.compile_halves()
    recomputation = set_up_recomputation(config, environment, model)
    check_parameters([(name, list(p.shape)) for name, p in model.named_parameters()], environment)
    # torch's fully_shard has units of its own, and a whole pass may not fit before it has made them
    measures = not ENGINES[config.communication.engine].shards
    order = _shared_ready_order(config, environment, model) if measures else expected_ready_order(model)
    ordering = make_ordering(config, model, order)
    ends, record = _bucket_ends(config, environment, model, ordering, planned)
    layout = lay_out(ordering, ends, shards_of(config))
    check_layout(layout, model, environment)
    engine = make_engine(config, environment, model, layout)
    if engine.is_sharded and config.train.compile:
        torch.compiler.reset()  # what was traced so far does not know the hooks that wait for weights
    optimizer = RankOptimizer(engine, list(model.named_parameters()), config.optimizer)
    if isinstance(engine.wire, OneBit):
        pair_with_wire(engine.wire, optimizer.optimizer, list(model.parameters()))
    loss_scale = LossScale(config.train.loss_scale, environment.device) if environment.dtype == torch.float16 else None
    step_class: type[TrainStep] = attribute(OBJECTIVES[config.train.objective].step)
    step = step_class(
        engine,
        optimizer.optimizer,
        make_objective(config),
        device=environment.device,
        dtype=environment.dtype,
        world_size=environment.world_size,
        loss_scale=loss_scale,
        parameters_by_bucket=optimizer.parameters_by_bucket if config.optimizer.step_per_bucket else None,
        use_device_timers=not config.train.cuda_graphs,
        ranks_per_node=config.system.node_size,
    )
    average = build_average([each.parameter for each in optimizer.slices], config.averaging)
    warm_up(config, environment, TrainComponents(model, engine, optimizer, loss_scale, step))
    seed_ranks(config.train.seed, environment)
    if not config.train.cuda_graphs:
        return TrainComponents(model, engine, optimizer, loss_scale, step, record, average, recomputation)
    tensor_rates(optimizer.optimizer, environment.device)
    graphed = CudaGraphStep(step, config.data.max_seq_len, capture_on_cuda, DeviceTimer())
    return TrainComponents(model, engine, optimizer, loss_scale, graphed, record, average, recomputation)


def pair_with_wire(wire: OneBit, optimizer: RunOptimizer, parameters: list[nn.Parameter]) -> None:
    """Let the wire format read the optimizer's moments, and the optimizer know what it is given."""
    if isinstance(wire, ZeroOne):
        assert isinstance(optimizer, ZeroOneAdam)
        optimizer.kind = lambda: wire.kind
        wire.attach_local(optimizer, parameters)
    else:
        assert isinstance(optimizer, TakesMomentum)
        optimizer.takes_momentum = lambda: wire.sent_momentum

    def moments(index: int) -> tuple[torch.Tensor, torch.Tensor]:
        entry = optimizer.state[parameters[index]]
        return entry["exp_avg"], entry["exp_avg_sq"]

    wire.attach(moments, optimizer.param_groups[0]["betas"][0])


def make_objective(config: Config) -> Objective:
    """The objective of the config."""
    kind, section = find(OBJECTIVES, config.train.objective), OBJECTIVES[config.train.objective].section
    objective: Objective = kind(getattr(config, section)) if section else kind()
    return objective


def build_model(config: Config, environment: Environment) -> BertForPretraining:
    """The model on its device, with the config's starting weights; the same on every rank.

    Raises:
        UserError: it cannot fit the device's memory, or its checkpoint does not fit it.
    """
    problem = offloads_nothing(config, environment.device.type)
    if problem is not None:
        raise UserError(problem)
    check_memory(config, environment.device)
    shape = config.model
    backend = choose_backend(shape.attention_backend, environment.device, environment.dtype, shape.attention_dropout)
    torch.manual_seed(config.train.seed)
    with environment.device:  # 336 million random numbers take a CPU seconds
        model = make_objective(config).build_model(shape, backend)
    if config.checkpoint.init_from:
        load_pretrained(
            model, shape, config.checkpoint.init_from, heads=not OBJECTIVES[config.train.objective].on_pairs
        )
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
        state = optimizer_bytes(shape, config.optimizer, unknown=0.0, shards=num_shards(config))
        window = OPTIMIZERS[config.optimizer.name].window
        if window is not None and 2 * state > least_bytes(config):
            rows = config.optimizer.window or window.rows
            raise UserError(
                f"optimizer.window={rows} gradients of optimizer.name={config.optimizer.name} take {state / 2**30:,.1f} GiB, "
                f"which makes {needed / 2**30:,.1f} GiB for {ranks} rank(s), and {what} has {there / 2**30:,.1f}; make "
                "optimizer.window, density or rank smaller"
            )
        raise UserError(
            f"model.vocab_size={shape.vocab_size}, hidden_size={shape.hidden_size}, num_layers={shape.num_layers}, "
            f"intermediate_size={shape.intermediate_size} with batch.micro_batch_size={config.batch.micro_batch_size} need "
            f"at least {needed / 2**30:,.1f} GiB for {ranks} rank(s), and {what} has {there / 2**30:,.1f}; make one of them "
            "smaller"
        )


def make_ordering(config: Config, model: nn.Module, ready_order: list[int]) -> Ordering:
    """The order of the model's gradients, and the clip groups of the config."""
    named = list(model.named_parameters())
    return order_gradients(
        [name for name, _ in named],
        [p.numel() for _, p in named],
        ready_order,
        clip_groups=config.communication.clip_groups,
        whole_groups=CLIP_MODES[config.communication.clip].by_group,
    )


def make_layout(config: Config, model: nn.Module, ready_order: list[int]) -> GradientLayout:
    """The layout of a config that gives the sizes of its buckets (those of `bucket_mb: auto` are measured first)."""
    assert config.communication.bucket_mb != "auto"
    ordering = make_ordering(config, model, ready_order)
    return lay_out(ordering, bucket_ends(ordering, config.communication.bucket_mb), shards_of(config))


def shards_of(config: Config) -> int:
    """Into how many equal parts a bucket must be divisible."""
    communication = config.communication
    in_parts = communication.shard_optimizer or not WIRE_FORMATS[communication.reduce_dtype].is_cast
    return config.system.world_size if in_parts else 1


def make_wire(config: Config, environment: Environment, gradient_dtype: torch.dtype) -> WireFormat:
    """What gradients of `gradient_dtype` are sent as."""
    communication = config.communication
    scale = fp16_scale(communication.clip, communication.max_norm, environment.dtype == torch.float16)
    choice = WIRE_FORMATS[communication.reduce_dtype]
    given = {name: getattr(communication, name) for name in choice.settings}
    if choice.by_node:
        given["ranks_per_node"] = config.system.node_size
    return wire_format(communication.reduce_dtype, gradient_dtype, scale, **given)


def make_engine(config: Config, environment: Environment, model: nn.Module, layout: GradientLayout) -> Engine:
    """The communication engine of the config. One rank without a process group has nothing to shard.

    Raises:
        UserError: sharding needs another backend, or virtual ranks another wire format.
    """
    communication, virtual_ranks = config.communication, config.batch.virtual_ranks
    table = ENGINES
    on_gloo = dist.is_initialized() and environment.device.type == "cuda" and dist.get_backend() == "gloo"
    if communication.shard_optimizer and dist.is_initialized():
        if on_gloo:
            raise UserError("communication.shard_optimizer on CUDA needs NCCL; set communication.backend=nccl or auto")
        table = SHARDED_ENGINES
    if on_gloo and ENGINES[communication.engine].shards:
        raise UserError(
            f"communication.engine={communication.engine} on CUDA needs NCCL; set communication.backend=nccl or auto"
        )
    if on_gloo and not WIRE_FORMATS[communication.reduce_dtype].is_cast:
        raise UserError(
            f"communication.reduce_dtype={communication.reduce_dtype} on CUDA needs NCCL; set communication.backend=nccl or "
            "auto"
        )
    wire = make_wire(config, environment, next(model.parameters()).dtype)
    given: dict[str, Any] = {"release_gradients": True} if config.memory.release_gradients else {}
    if ENGINES[communication.engine].shards:
        given = {
            "reshard_after_forward": communication.reshard_after_forward,
            "within_node": communication.shard_within_node,
            "ranks_per_node": config.system.node_size,
            "on_host": config.memory.offload_weights,
        }
    engine: Engine = find(table, communication.engine)(
        model, layout, clip=communication.clip, max_norm=communication.max_norm, wire=wire, **given
    )
    if virtual_ranks > 1:
        if not wire.is_cast:
            raise UserError(
                f"batch.virtual_ranks={virtual_ranks} with communication.reduce_dtype={communication.reduce_dtype}, which is "
                "more than a cast and may keep what it did not send of one rank's gradient; set "
                "communication.reduce_dtype=fp32 or batch.virtual_ranks=1"
            )
        engine.enable_virtual_ranks(virtual_ranks)
    return engine


def bucket_note(config: Config, layout: GradientLayout) -> str | None:
    """What to say of a list of bucket sizes that is not as long as the model has buckets."""
    sizes, count = config.communication.bucket_mb, len(layout.buckets)
    if not isinstance(sizes, list) or len(sizes) == count:
        return None
    what = f"communication.bucket_mb lists {len(sizes)} sizes and the model fills {count} buckets: "
    return what + ("the last size repeats" if len(sizes) < count else "the other sizes are not used")


def _shared_ready_order(config: Config, environment: Environment, model: BertForPretraining) -> list[int]:
    """Rank 0's measured order, the same on all ranks."""
    measured = measure_ready_order(
        list(model.parameters()), lambda: synthetic_loss(config, environment, model).backward()
    )
    model.zero_grad(set_to_none=True)
    return [int(index) for index in broadcast_numbers(measured, environment.device, torch.int64)]


def _bucket_ends(
    config: Config,
    environment: Environment,
    model: BertForPretraining,
    ordering: Ordering,
    planned: dict[str, Any] | None,
) -> tuple[list[int], BucketRecord | None]:
    """Where the buckets end: as the config's sizes have it, as they were planned before, or as is planned now."""
    if config.communication.bucket_mb != "auto":
        return bucket_ends(ordering, config.communication.bucket_mb), None
    ends = ends_of_record(planned, ordering) if planned is not None else None
    if ends is not None:
        return ends, None
    record = measure_and_plan(config, environment, model, ordering, lambda: synthetic_loss(config, environment, model))
    return list(record.plan.ends), record
