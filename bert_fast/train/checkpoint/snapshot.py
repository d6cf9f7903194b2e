"""The tensors of a run as slices of a checkpoint: weights, the optimizer's moments, each rank's own state.

model.NAME               weights and buffers, each once (a tied one under its first name)
optimizer.MOMENT.NAME    the optimizer's state, element by element of the parameter NAME
rank.RANK                that rank's random state and what its wire format keeps, as bytes
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from bert_fast.train.checkpoint.storage import TensorSlice, read_bytes, read_metadata, read_slices
from bert_fast.train.components import TrainComponents
from bert_fast.train.environment import Environment


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


def slices_to_write(components: TrainComponents, environment: Environment) -> list[TensorSlice]:
    """Views of the weights and moments that this rank writes: what all ranks have is shared out evenly.

    They are those of the last update until the next one: weights on the wire (sharded optimizer) are waited for.
    """
    components.engine.wait_pending()
    whole = [(f"model.{name}", value) for name, value in _tensors(components.model)]
    slices = []
    optimizer = components.optimizer.optimizer
    state = optimizer.state
    for held in components.optimizer.slices:
        entry = state.get(held.parameter, {})
        for key, value in ((name, entry[name]) for name in optimizer.state_names if name in entry):
            if components.engine.is_sharded:
                slices.append(TensorSlice(f"optimizer.{key}.{held.name}", held.begin, held.numel, _flat(value)))
            else:
                whole.append((f"optimizer.{key}.{held.name}", value))
    sizes = [value.numel() for _, value in whole]
    for index, begin, end in own_slices(sizes, environment.rank, environment.world_size):
        name, value = whole[index]
        slices.append(TensorSlice(name, begin, value.numel(), _flat(value)[begin:end]))
    return slices


def optimizer_counts(components: TrainComponents) -> dict[str, Any]:
    """How often the optimizer has stepped, as plain values. A collective where it is sharded."""
    groups = components.optimizer.optimizer.param_groups
    return {
        "step": components.optimizer.step_count(),
        "groups": [_plain(group.get("step")) for group in groups],  # apex counts per group
    }


def rank_state(components: TrainComponents, environment: Environment) -> dict[str, Any]:
    """What every rank has of its own: random state, and what its wire format keeps (error feedback). Copies."""
    state: dict[str, Any] = {"cpu": torch.get_rng_state()}
    if environment.device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(environment.device)
    return {**state, "wire": _copied(components.engine.wire.state_dict())}


def rank_name(rank: int) -> str:
    """The name of a rank's own state in a checkpoint."""
    return f"rank.{rank}"


def load_tensors(
    path: Path, components: TrainComponents, environment: Environment, counts: dict[str, Any], same_ranks: bool
) -> None:
    """Put a checkpoint's tensors back, on every rank by itself.

    Args:
        counts: of `optimizer_counts`.
        same_ranks: as many ranks as wrote it, so that each takes its own state too.
    """
    components.engine.wait_pending()
    metadata = read_metadata(path)
    slices = [TensorSlice(f"model.{n}", 0, v.numel(), _flat(v)) for n, v in _tensors(components.model)]
    optimizer = components.optimizer.optimizer
    optimizer.state.clear()
    for held in components.optimizer.slices:
        for key in optimizer.state_names:
            name = f"optimizer.{key}.{held.name}"
            if name in metadata.state_dict_metadata:
                value = torch.empty_like(held.parameter)
                optimizer.state[held.parameter][key] = value
                slices.append(TensorSlice(name, held.begin, held.numel, _flat(value)))
        if counts["step"] is not None and optimizer.step_dtype is not None and optimizer.state.get(held.parameter):
            step = torch.tensor(counts["step"], dtype=optimizer.step_dtype, device=held.parameter.device)
            optimizer.state[held.parameter] = {"step": step, **optimizer.state[held.parameter]}
    for group, step in zip(optimizer.param_groups, counts["groups"], strict=True):
        if step is not None:
            group["step"] = step
    with torch.no_grad():
        read_slices(path, slices)
    own = read_bytes(path, metadata, rank_name(environment.rank)) if same_ranks else None
    if own is not None:
        torch.set_rng_state(own["cpu"])
        if environment.device.type == "cuda":
            torch.cuda.set_rng_state(own["cuda"], environment.device)
        components.engine.wire.load_state_dict(own["wire"])


def _tensors(model: nn.Module) -> list[tuple[str, torch.Tensor]]:
    """Weights and buffers, each once (a tied one under its first name)."""
    seen: dict[int, tuple[str, torch.Tensor]] = {}
    for name, value in model.state_dict(keep_vars=True).items():
        if isinstance(value, torch.Tensor):
            seen.setdefault(id(value), (name, value.detach()))
    return list(seen.values())


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
