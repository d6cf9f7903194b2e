"""`--dry-run`: build everything that a run builds, run no step, and print what would happen."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from bert_fast.balance.lengths import wikipedia_like
from bert_fast.balance.planner import Planner
from bert_fast.communication.buckets import Ordering, bucket_ends, lay_out, measure_ready_order
from bert_fast.config import Config, OptimizerConfig
from bert_fast.config.choices import ENGINES, OBJECTIVES, OPTIMIZERS, attribute
from bert_fast.data.masking import check_fraction
from bert_fast.data.store import Store
from bert_fast.memory.estimate import MemoryEstimate, chain_of, estimate
from bert_fast.memory.remat import Plan, keep_all, least_peak, make_plan
from bert_fast.memory.stages import MicroBatch
from bert_fast.memory.state import num_parameters, num_shards, optimizer_state, rank_notes
from bert_fast.model.attention import choose_backend
from bert_fast.model.bert import BertForPretraining, expected_ready_order
from bert_fast.optim.build import build_optimizer
from bert_fast.optim.schedule import learning_rate
from bert_fast.report.console import print_table, share_bar
from bert_fast.run_folder import run_folder
from bert_fast.train.batches import synthetic_batch, to_device
from bert_fast.train.environment import Environment, pick_device, pick_dtype
from bert_fast.train.rank_optimizer import RankOptimizer
from bert_fast.train.setup.build import make_engine, make_objective, make_ordering, shards_of
from bert_fast.train.setup.cost_model import make_cost, make_planner
from bert_fast.train.setup.memory_fit import (
    PlannedMemory,
    fit_lines,
    fit_to_budget,
    hardware_of,
    is_open,
    memory_at_most,
)
from bert_fast.train.setup.warmup import made_up_for, total_of

_PLANNED_STEPS, _PLANNING_S = 20, 3.0
# Optimizers beside which the memory of a window of gradients is shown
_COMPARED: dict[str, dict[str, Any]] = {
    "adamw": {"name": "adamw"},
    "mfac_sparse, 128 at 1 %": {"name": "mfac_sparse"},
    "mfac_sparse, 1,024 at 0.1 %": {"name": "mfac_sparse", "window": 1024, "density": 0.001},
    "mfac_lowrank, 32 of rank 4": {"name": "mfac_lowrank", "window": 32},
    "micro_adam, 10 at 1 %": {"name": "micro_adam"},
    "mfac, 128": {"name": "mfac"},
}


def dry_run(config: Config) -> None:
    """Print batch arithmetic, memory, plan and bucket layout of a config.

    The model is built on the meta device, so that any size fits this machine; the plan is computed for all ranks. The
    ready order of gradients is the model's own order reversed (a run measures it).
    """
    if is_open(config):
        config, found = fit_to_budget(config)
        print_table("what the budget allows", [("", line) for line in fit_lines(found)])
    device = pick_device("cpu" if not torch.cuda.is_available() else config.system.device, 0)
    wanted = config.system.device if config.system.device != "auto" else device.type
    dtype = pick_dtype(config.train.precision, device)
    with torch.device("meta"):
        model = BertForPretraining(config.model)
    build_optimizer(model.named_parameters(), config.optimizer.model_copy(update={"use_apex": False}))
    ordering = make_ordering(config, model, expected_ready_order(model))
    lengths, where = _lengths(config)
    planner = make_planner(config, lengths)
    most = memory_at_most(config, dtype)
    memory, tokens = _memory(config, planner, dtype, most.plan)
    print_table(
        f"{config.run.name}: dry run",
        [
            ("run folder", str(run_folder(config))),
            ("batch", _batch_text(config)),
            ("model", f"{num_parameters(config.model):,} parameters"),
            ("attention", _backend_text(config, wanted, device, dtype)),
            (
                "precision",
                str(dtype).removeprefix("torch.") + ("" if wanted == device.type else f" here; decided on {wanted}"),
            ),
            ("learning rate", _schedule_text(config)),
            ("memory of a rank", _memory_text(config, memory, tokens)),
            ("recomputation", _recomputation_text(config, most)),
            ("lengths", where),
            ("plan", _plan_text(config, planner)),
            ("clipping", f"{config.communication.clip}, {len(ordering.groups)} clip groups"),
            ("rehearsal", rehearse(config)),
            ("buckets", _bucket_text(config, ordering)),
            *(("note", note) for note in rank_notes(config)),
        ],
    )
    print_table(
        "memory of a rank, MiB: in the first step, and at most by the config", _memory_rows(memory, most.memory)
    )
    print_table("kept from step to step, bytes per parameter", _kept_rows(config, memory))


def _kept_rows(config: Config, memory: MemoryEstimate) -> list[tuple[str, str]]:
    """Bytes for each parameter of what a rank keeps from step to step; of windows of gradients, beside those of other sizes."""
    count = num_parameters(config.model)
    shards = num_shards(config)

    def row(name: str, num_bytes: float) -> tuple[str, str]:
        return name, f"{num_bytes / count:8.2f} {num_bytes / 2**20:12,.1f} MiB"

    state, name = optimizer_state(config.model, config.optimizer, shards), config.optimizer.name
    rows = [row("weights", memory.weights), row("gradients", memory.gradients)]
    if state is None:
        rows.append((name, "not known: it depends on its arguments"))
    else:
        rows += [row(f"{name}: {part}", num_bytes) for part, num_bytes in state.items()]
        rows.append(row(f"{name}, all", sum(state.values())))
    rows += [
        row(what, num_bytes)
        for what, num_bytes in (("averages of the weights", memory.averages), ("not sent yet", memory.residuals))
        if num_bytes
    ]
    if OPTIMIZERS[name].window is not None:
        for what, other in _COMPARED.items():
            of_other = optimizer_state(config.model, OptimizerConfig(**other))
            assert of_other is not None
            rows.append(row(f"to compare: {what}", sum(of_other.values())))
    return rows


def rehearse(config: Config, num_layers: int = 2) -> str:
    """One step of the last rank on the meta device: real widths, a few layers, every collective answered at once.

    Nothing is computed and nothing is sent; what does not fit together (layout, engine, optimizer) fails here.
    """
    if ENGINES[config.communication.engine].needs_group:
        return f"none: engine {config.communication.engine} wants a device"
    from torch.testing._internal.distributed.fake_pg import FakeStore

    meta, world = torch.device("meta"), config.system.world_size
    shape = config.model.model_copy(update={"num_layers": min(num_layers, config.model.num_layers)})
    batch_config = config.batch.model_copy(update={"virtual_ranks": min(2, config.batch.virtual_ranks)})
    config = config.model_copy(update={"model": shape, "batch": batch_config})
    dist.init_process_group("fake", store=FakeStore(), rank=world - 1, world_size=world)
    try:
        environment = Environment(world - 1, (world - 1) % config.system.node_size, world, meta, torch.float32)
        with meta:
            model = make_objective(config).build_model(shape, "loop")
        count, longest = min(4, config.batch.micro_batch_size), config.longest_sample
        batch = made_up_for(config)(synthetic_batch(count, longest, shape.vocab_size, 0, config.data.mask_share))
        inputs = to_device(batch, meta, config.batch.shape_multiple)

        def backward() -> None:
            total_of(model, model(inputs)).backward()

        order = measure_ready_order(list(model.parameters()), backward)
        model.zero_grad(set_to_none=True)
        ordering = make_ordering(config, model, order)
        engine = make_engine(config, environment, model, lay_out(ordering, _ends(config, ordering), shards_of(config)))
        own = config.optimizer.model_copy(update={"use_apex": False})
        optimizer = RankOptimizer(engine, list(model.named_parameters()), own).optimizer
        for group in optimizer.param_groups:
            group["fused"] = False  # torch's fused update knows real devices only
        engine.zero_grad()
        for virtual_rank in range(engine.num_virtual_ranks):
            last = virtual_rank == engine.num_virtual_ranks - 1
            with engine.micro_batch(last):
                backward()
            if not last:
                engine.end_virtual_rank()
        engine.finish()
        if not optimizer.has_opaque_state:  # others may read numbers, which meta tensors do not have
            optimizer.step()
        engine.wait_pending()
        sent = engine.counters()["gradient_bytes"] / 2**20
    finally:
        dist.destroy_process_group()
    return f"a step of rank {world - 1:,} of {world:,} with {shape.num_layers} layers: {sent:,.1f} MiB of gradients to reduce"


def _lengths(config: Config) -> tuple[np.ndarray, str]:
    folder = Path(config.data.train)
    if (folder / "manifest.json").is_file():
        choice = OBJECTIVES[config.train.objective]
        store: Store = attribute(choice.store)(folder)
        if not choice.on_pairs:
            check_fraction(store.manifest, config.data.train, config.data)
        mean = store.manifest["mean_length"]
        return (
            store.lengths,
            f"{len(store):,} samples of {folder}, mean {mean:.0f}, longest {store.manifest['max_length']}",
        )
    longest = config.longest_sample
    lengths = np.minimum(wikipedia_like(max(100_000, 4 * config.batch.global_batch_size)), longest)
    return (
        lengths,
        f"no data at {folder} yet: plan and memory are for lengths as in MLPerf's Wikipedia, up to {longest}",
    )


def _batch_text(config: Config) -> str:
    batch, world = config.batch, config.system.world_size
    nodes, ranks, virtual = world // config.system.node_size, world * batch.virtual_ranks, ""
    if batch.virtual_ranks > 1:
        virtual = f"{ranks:,} ranks = {world:,} real x {batch.virtual_ranks:,} virtual; "
    return (
        f"{batch.global_batch_size:,} = {batch.micro_batch_size} x {ranks:,} ranks x "
        f"{batch.gradient_accumulation_steps} micro-batches; {virtual}{nodes:,} node(s) of {config.system.node_size}"
    )


def _backend_text(config: Config, wanted: str, device: torch.device, dtype: torch.dtype) -> str:
    name = config.model.attention_backend
    if wanted != device.type:
        return f"{name}, decided on {wanted}"
    return choose_backend(name, device, dtype, config.model.attention_dropout)


def _schedule_text(config: Config) -> str:
    last = config.train.max_steps - 1
    points = sorted({0, min(config.schedule.warmup_steps, last), last // 2, last})
    rates = (f"step {s}: {learning_rate(s, config.optimizer.lr, config.schedule):.3g}" for s in points)
    return f"{config.optimizer.name}, " + ", ".join(rates)


def _memory(config: Config, planner: Planner, dtype: torch.dtype, how: Plan) -> tuple[MemoryEstimate, int]:
    """The estimate for the largest micro-batch of the first step, run by the plan of the longest one, and its tokens."""
    plan, hardware = planner.plan(0), hardware_of(config, dtype)
    tokens = int(plan.tokens.max())
    batch = MicroBatch(
        tokens,
        int(plan.tokens_squared.max()),
        max(1, int(config.data.mask_share * tokens)),
        config.batch.micro_batch_size,
    )
    chain = chain_of(config, batch, hardware)
    return estimate(config, chain, make_plan(chain, how.segments), on_cpu=hardware.on_cpu), tokens


def _memory_rows(first: MemoryEstimate, most: MemoryEstimate) -> list[tuple[str, str]]:
    rows = [
        (name, f"{value / 2**20:12,.1f} {most.parts()[name] / 2**20:12,.1f}")
        for name, value in first.parts().items()
        if most.parts()[name]
    ]
    rows.append(("all", f"{first.total / 2**20:12,.1f} {most.total / 2**20:12,.1f}"))
    return [*rows, ("", share_bar({name: value for name, value in most.parts().items() if value}))]


def _recomputation_text(config: Config, most: PlannedMemory) -> str:
    """What is computed again, what that saves and costs, and what the least peak would be."""
    if most.too_small:
        return most.too_small
    how, kept, least = config.memory.recompute, keep_all(most.chain), least_peak(most.chain)
    peak, share = most.plan.peak_bytes / 2**20, 100 * most.plan.recompute_s / most.chain.forward_s
    text = f"{how}: activations at most {peak:,.0f} MiB"
    if share:
        text += f" instead of {kept.peak_bytes / 2**20:,.0f}, for {share:.0f} % of a forward pass by FLOPs"
    return f"{text}; the least peak is {least.peak_bytes / 2**20:,.0f} MiB (memory.recompute=optimal)"


def _memory_text(config: Config, memory: MemoryEstimate, tokens: int) -> str:
    listed = ", ".join(f"{name} {value / 2**20:,.0f}" for name, value in memory.parts().items() if value)
    bound = "at least" if optimizer_state(config.model, config.optimizer) is None else "about"
    return f"{bound} {memory.total / 2**20:,.0f} MiB ({listed}) for a micro-batch of {tokens:,} tokens"


def _plan_text(config: Config, planner: Planner) -> str:
    plans = [planner.plan(0)]
    end = time.monotonic() + _PLANNING_S
    while len(plans) < min(_PLANNED_STEPS, config.train.max_steps) and time.monotonic() < end:
        plans.append(planner.plan(len(plans)))
    values = [plan.imbalance for plan in plans]
    source = "fitted before the clock (here: FLOPs)" if config.balance.cost == "measure" else make_cost(config)[1]
    bounds = [planner.bound(plan) for plan in plans]
    text = (
        f"{config.balance.strategy}: imbalance mean {np.mean(values):.4f}, worst {max(values):.4f} of {len(plans)} steps; "
        f"no plan of these samples is below {np.mean(bounds):.4f}, worst {max(bounds):.4f}; cost from {source}"
    )
    if plans[0].num_rows:
        fill = np.mean([np.sum(planner.lengths_of(plan)) / plan.tokens.sum() for plan in plans])
        grown = sum(plan.num_rows > plans[0].num_rows for plan in plans)
        text += f"; {plans[0].num_rows} rows a micro-batch, {100 * fill:.1f} % filled, {grown} steps need more rows"
    if planner.cap is not None:
        capped = sum(plan.capped for plan in plans)
        text += f"; at most {planner.cap:,} tokens a micro-batch, which changed {capped} of these steps"
    return text


def _ends(config: Config, ordering: Ordering) -> list[int]:
    """Where buckets end; `auto` plans them from measurements, which a dry run does not make: here one per unit."""
    size = config.communication.bucket_mb
    return list(range(1, len(ordering.units) + 1)) if size == "auto" else bucket_ends(ordering, size)


def _bucket_text(config: Config, ordering: Ordering) -> str:
    if config.communication.bucket_mb == "auto":
        return (
            f"planned before the clock from measurements: at most {len(ordering.units)}, of whole gradients or groups"
        )
    layout = lay_out(ordering, _ends(config, ordering), shards_of(config))
    sizes = [sum(layout.numel[i] for i in b.parameters) * 4 / 2**20 for b in layout.buckets]
    shown = ", ".join(f"{size:.2f}" for size in sizes[:12]) + (", ..." if len(sizes) > 12 else "")
    return f"{len(sizes)} of {shown} MiB in ready order"
