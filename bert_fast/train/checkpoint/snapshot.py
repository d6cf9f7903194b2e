"""The tensors of a run as slices of a checkpoint: weights, the optimizer's moments, each rank's own state.

model.NAME               weights and buffers, each once (a tied one under its first name)
optimizer.MOMENT.NAME    the optimizer's state, element by element of the parameter NAME
optimizer_state          all of its state as bytes, where that may be of any shape (RunOptimizer.has_opaque_state)
average.ROW.NAME         averages of the weights, or the snapshots that they are means of
rank.RANK                that rank's random state and what its wire format keeps, as bytes
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.distributed.checkpoint.metadata import Metadata

from bert_fast.communication.engine import Engine
from bert_fast.errors import UserError
from bert_fast.optim.opaque import load_opaque_state, opaque_state
from bert_fast.train.checkpoint.storage import TensorSlice, as_bytes, read_bytes, read_metadata, read_slices
from bert_fast.train.components import TrainComponents
from bert_fast.train.environment import Environment

_OPAQUE = "optimizer_state"


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
    held_here = [*_optimizer_slices(components), *_average_slices(components)]
    slices: list[TensorSlice] = []
    if not components.engine.holds_all_weights:
        whole, held_here = [], [*_weight_slices(components), *held_here]
    if not components.engine.is_first_copy:
        held_here = []
    if components.engine.is_sharded:
        slices += held_here
    else:
        whole += [(each.name, each.values) for each in held_here]
    if components.optimizer.optimizer.has_opaque_state and (environment.is_main or components.engine.is_sharded):
        saved = {"of": _slices_of(components), "state": opaque_state(components.optimizer.optimizer)}
        slices.append(as_bytes(_opaque_name(components, environment), saved))
    sizes = [value.numel() for _, value in whole]
    for index, begin, end in own_slices(sizes, environment.rank, environment.world_size):
        name, value = whole[index]
        slices.append(TensorSlice(name, begin, value.numel(), _flat(value)[begin:end]))
    return slices


def _weight_slices(components: TrainComponents) -> Iterator[TensorSlice]:
    """This rank's part of the weights."""
    for held in components.optimizer.slices:
        yield TensorSlice(f"model.{held.name}", held.begin, held.numel, _flat(held.parameter))


def _optimizer_slices(components: TrainComponents) -> Iterator[TensorSlice]:
    """The state that the optimizer has of each of this rank's slices."""
    optimizer = components.optimizer.optimizer
    if optimizer.has_opaque_state:
        return
    for held in components.optimizer.slices:
        entry = optimizer.state.get(held.parameter, {})
        for key in (name for name in optimizer.state_names if name in entry):
            yield TensorSlice(f"optimizer.{key}.{held.name}", held.begin, held.numel, _flat(entry[key]))


def _average_slices(components: TrainComponents) -> Iterator[TensorSlice]:
    """The averages of this rank's slices, row by row; those that have begun."""
    if components.average is None:
        return
    for number, row in enumerate(components.average.rows()):
        for held, value in zip(components.optimizer.slices, row, strict=True):
            yield TensorSlice(f"average.{number}.{held.name}", held.begin, held.numel, _flat(value))


def optimizer_counts(components: TrainComponents) -> dict[str, Any]:
    """What the optimizer counts, as plain values: for each kind of parameter, and for each group. A collective where sharded.

    Empty where its state is written as bytes, which have everything.
    """
    optimizer = components.optimizer.optimizer
    if optimizer.has_opaque_state:
        return {"scalars": {}, "groups": []}
    names = optimizer.group_state_names
    return {
        "scalars": components.optimizer.scalars(),
        "groups": [{name: _plain(group[name]) for name in names if name in group} for group in optimizer.param_groups],
    }


def rank_state(components: TrainComponents, environment: Environment) -> dict[str, Any]:
    """What every rank has of its own: random state, and what its wire format keeps (error feedback). Copies."""
    state: dict[str, Any] = {"cpu": torch.get_rng_state()}
    if environment.device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(environment.device)
    return {**state, "wire": _on_cpu(components.engine.wire.state_dict())}


def rank_name(rank: int) -> str:
    """The name of a rank's own state in a checkpoint."""
    return f"rank.{rank}"


def load_tensors(
    path: Path,
    components: TrainComponents,
    environment: Environment,
    counts: dict[str, Any],
    num_ranks: int,
    average_count: int = 0,
) -> None:
    """Put a checkpoint's tensors back, on every rank by itself.

    Args:
        counts: of `optimizer_counts`.
        num_ranks: how many ranks wrote it. As many as now: each takes its own state too. Others: what their wire formats had
            not sent is shared out.
        average_count: updates of the average of the weights.

    Raises:
        UserError: it is damaged, or of another model or optimizer.
    """
    components.engine.wait_pending()
    metadata = read_metadata(path)
    if components.engine.holds_all_weights:
        slices = [TensorSlice(f"model.{n}", 0, v.numel(), _flat(v)) for n, v in _tensors(components.model)]
    else:
        slices = list(_weight_slices(components))
    if components.optimizer.optimizer.has_opaque_state:
        _load_opaque(path, metadata, components, environment, num_ranks)
    else:
        slices += _restored_optimizer(path, metadata, components, counts)
    if components.average is not None:
        components.average.restore_count(average_count)
        slices += _average_slices(components)
    with torch.no_grad():
        read_slices(path, slices)
    wire = components.engine.wire
    try:
        if num_ranks == environment.world_size:
            own = read_bytes(path, metadata, rank_name(environment.rank))
            torch.set_rng_state(own["cpu"])
            if environment.device.type == "cuda":
                torch.cuda.set_rng_state(own["cuda"], environment.device)
            wire.load_state_dict(own["wire"])
        elif not wire.is_cast:
            taken_over = range(environment.rank, num_ranks, environment.world_size)
            states = [read_bytes(path, metadata, rank_name(rank))["wire"] for rank in taken_over]
            wire.take_over(states, read_bytes(path, metadata, rank_name(0))["wire"])
    except (KeyError, TypeError, ValueError, IndexError) as error:
        text = str(error).partition("\n")[0][:120]
        raise UserError(
            f"checkpoint {path} cannot be read (a rank's state: {type(error).__name__}: {text}); remove it"
        ) from None


def _restored_optimizer(
    path: Path, metadata: Metadata, components: TrainComponents, counts: dict[str, Any]
) -> list[TensorSlice]:
    """Make the optimizer's state anew, with its counts; the slices in which its tensors are to be read."""
    optimizer, slices = components.optimizer.optimizer, []
    optimizer.state.clear()
    for held in components.optimizer.slices:
        for key in optimizer.state_names:
            name = f"optimizer.{key}.{held.name}"
            if name in metadata.state_dict_metadata:
                value = torch.empty_like(held.parameter)
                optimizer.state[held.parameter][key] = value
                slices.append(TensorSlice(name, held.begin, held.numel, _flat(value)))
        if optimizer.state.get(held.parameter):
            optimizer.restore_scalars(held.parameter, counts["scalars"])
    if len(counts["groups"]) != len(optimizer.param_groups):
        raise UserError(
            f"checkpoint {path} is damaged (it has {len(counts['groups'])} groups of parameters and the optimizer "
            f"{len(optimizer.param_groups)}); remove it"
        )
    for group, values in zip(optimizer.param_groups, counts["groups"], strict=True):
        group.update({name: values[name] for name in optimizer.group_state_names if name in values})
    return slices


def _opaque_name(components: TrainComponents, environment: Environment) -> str:
    return f"{_OPAQUE}.{environment.rank}" if components.engine.is_sharded else _OPAQUE


def _sharding_setting(engine: Engine) -> str:
    """The setting of the config by which the optimizer's state is in parts, or is not."""
    if not engine.holds_all_weights:
        return "communication.engine=fsdp"
    return f"communication.shard_optimizer={str(engine.is_sharded).lower()}"


def _slices_of(components: TrainComponents) -> list[list[Any]]:
    """Of which elements of which parameters this rank's optimizer has the state."""
    return [[each.name, each.begin, each.parameter.numel()] for each in components.optimizer.slices]


def _load_opaque(
    path: Path, metadata: Metadata, components: TrainComponents, environment: Environment, num_ranks: int
) -> None:
    """Rank 0's bytes, on every rank: all ranks have the same state. Where it is sharded, each rank's own."""
    name, is_sharded = _opaque_name(components, environment), components.engine.is_sharded
    was_sharded = f"{_OPAQUE}.0" in metadata.state_dict_metadata
    if was_sharded != is_sharded or (is_sharded and num_ranks != environment.world_size):
        of = f"{num_ranks} ranks, each a part," if was_sharded else "a run that is not sharded"
        raise UserError(
            f"checkpoint {path} has the state of this optimizer as {of} had it, which cannot be divided anew over "
            f"{environment.world_size} rank(s) with {_sharding_setting(components.engine)}; resume it as it was run"
        )
    saved = read_bytes(path, metadata, name)
    try:
        is_ours = saved["of"] == _slices_of(components)
        if is_ours:
            load_opaque_state(components.optimizer.optimizer, saved["state"])
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        text = str(error).partition("\n")[0][:120]
        raise UserError(
            f"checkpoint {path} cannot be read ({_OPAQUE}: {type(error).__name__}: {text}); remove it"
        ) from None
    if not is_ours:
        raise UserError(
            f"checkpoint {path} has the state of this optimizer for other parts of the model, which are of other buckets "
            "or another engine; resume with the communication settings that it was run with"
        )


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


def _on_cpu(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return value.detach().cpu()
    if isinstance(value, dict):
        return {key: _on_cpu(each) for key, each in value.items()}
    return [_on_cpu(each) for each in value] if isinstance(value, list) else value
