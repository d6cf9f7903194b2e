"""What of a machine goes into a checkpoint, and back."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from bert_fast.train.checkpoint.storage import TensorSlice, read_bytes, read_metadata, read_slices
from bert_fast.train.environment import Environment
from bert_fast.train.setup.build import TrainComponents
from bert_fast.train.sharded_optimizer import ShardedOptimizer


@dataclass(frozen=True)
class Held:
    """A parameter of the optimizer on this rank: elements [begin, begin + its size) of the model's flattened `name`."""

    name: str
    begin: int
    numel: int
    parameter: torch.Tensor


def _held(machinery: TrainComponents) -> list[Held]:
    optimizer = machinery.optimizer
    if isinstance(optimizer, ShardedOptimizer):
        return [Held(*each) for each in optimizer.held()]
    return [Held(name, 0, p.numel(), p) for name, p in machinery.model.named_parameters()]


def _inner(machinery: TrainComponents) -> torch.optim.Optimizer:
    optimizer = machinery.optimizer
    return optimizer.inner if isinstance(optimizer, ShardedOptimizer) else optimizer


def own_slices(sizes: list[int], rank: int, world: int) -> Iterator[tuple[int, int, int]]:
    """This rank's even share of tensors laid end to end, as (tensor, begin, end)."""
    total = sum(sizes)
    low, high = total * rank // world, total * (rank + 1) // world
    start = 0
    for index, size in enumerate(sizes):
        begin, end = max(low - start, 0), min(high - start, size)
        if begin < end:
            yield index, begin, end
        start += size


def captured(machinery: TrainComponents, environment: Environment) -> list[TensorSlice]:
    """Views of the weights and moments that this rank writes: what all ranks have is shared out evenly.

    They are those of the last update until the next one: weights on the wire (sharded optimizer) are waited for.
    """
    machinery.engine.wait_pending()
    whole = [(f"model.{name}", value) for name, value in _tensors(machinery.model)]
    stretches = []
    state = _inner(machinery).state
    sharded = isinstance(machinery.optimizer, ShardedOptimizer)
    for held in _held(machinery):
        for key, value in _moments(state.get(held.parameter, {}), held.parameter):
            if sharded:
                stretches.append(TensorSlice(f"optimizer.{key}.{held.name}", held.begin, held.numel, _flat(value)))
            else:
                whole.append((f"optimizer.{key}.{held.name}", value))
    sizes = [value.numel() for _, value in whole]
    for index, begin, end in own_slices(sizes, environment.rank, environment.world_size):
        name, value = whole[index]
        stretches.append(TensorSlice(name, begin, value.numel(), _flat(value)[begin:end]))
    return stretches


def optimizer_counts(machinery: TrainComponents) -> dict[str, Any]:
    """How often the optimizer has stepped, as plain values. A collective where it is sharded."""
    inner = _inner(machinery)
    if isinstance(machinery.optimizer, ShardedOptimizer):
        count: float | None = float(machinery.optimizer.steps())
    else:
        counts = [float(entry["step"]) for entry in inner.state.values() if "step" in entry]
        count = max(counts) if counts else None
    return {
        "step": count,
        "groups": [_plain(group.get("step")) for group in inner.param_groups],
    }  # apex counts by group


def rank_state(machinery: TrainComponents, environment: Environment) -> dict[str, Any]:
    """What every rank has of its own: random state, and what its wire format keeps (error feedback). Copies."""
    state: dict[str, Any] = {"cpu": torch.get_rng_state()}
    if environment.device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(environment.device)
    return {**state, "wire": _copied(machinery.engine.wire.state_dict())}


def rank_name(rank: int) -> str:
    """The entry of a rank's own state."""
    return f"rank.{rank}"


def restore(
    path: Path, machinery: TrainComponents, environment: Environment, counts: dict[str, Any], same_ranks: bool
) -> None:
    """Put a checkpoint back, on every rank by itself. `same_ranks`: as many as wrote it, so each takes its own state too."""
    machinery.engine.wait_pending()
    metadata = read_metadata(path)
    stretches = [TensorSlice(f"model.{n}", 0, v.numel(), _flat(v)) for n, v in _tensors(machinery.model)]
    inner = _inner(machinery)
    inner.state.clear()
    for held in _held(machinery):
        for key in ("exp_avg", "exp_avg_sq"):
            name = f"optimizer.{key}.{held.name}"
            if name in metadata.state_dict_metadata:
                value = torch.empty_like(held.parameter)
                inner.state[held.parameter][key] = value
                stretches.append(TensorSlice(name, held.begin, held.numel, _flat(value)))
        if counts["step"] is not None and inner.state.get(held.parameter):
            kind = torch.float32 if isinstance(inner, torch.optim.AdamW) else torch.float64
            step = torch.tensor(counts["step"], dtype=kind, device=held.parameter.device)
            inner.state[held.parameter] = {"step": step, **inner.state[held.parameter]}
    for group, step in zip(inner.param_groups, counts["groups"], strict=True):
        if step is not None:
            group["step"] = step
    with torch.no_grad():
        read_slices(path, stretches)
    own = read_bytes(path, metadata, rank_name(environment.rank)) if same_ranks else None
    if own is not None:
        torch.set_rng_state(own["cpu"])
        if environment.device.type == "cuda":
            torch.cuda.set_rng_state(own["cuda"], environment.device)
        machinery.engine.wire.load_state_dict(own["wire"])


def _tensors(model: nn.Module) -> list[tuple[str, torch.Tensor]]:
    """Weights and buffers, each once (a tied one under its first name)."""
    seen: dict[int, tuple[str, torch.Tensor]] = {}
    for name, value in model.state_dict(keep_vars=True).items():
        if isinstance(value, torch.Tensor):
            seen.setdefault(id(value), (name, value.detach()))
    return list(seen.values())


def _moments(entry: dict[str, Any], parameter: torch.Tensor) -> list[tuple[str, torch.Tensor]]:
    return [
        (k, v) for k, v in entry.items() if isinstance(v, torch.Tensor) and v.dim() and v.numel() == parameter.numel()
    ]


def _flat(value: torch.Tensor) -> torch.Tensor:
    """As one row, without a copy."""
    return value.detach().view(-1)


def _plain(value: Any) -> Any:
    return value.item() if isinstance(value, torch.Tensor) else value


def _copied(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return value.detach().cpu().clone()
    if isinstance(value, dict):
        return {key: _copied(each) for key, each in value.items()}
    return [_copied(each) for each in value] if isinstance(value, list) else value
