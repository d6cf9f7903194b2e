"""The whole state of an optimizer whose state may be of any shape and type, as plain values and tensors on the host.

torch's own `load_state_dict` casts every tensor to the format of its parameter, so that one kept in another format would not
come back bit for bit.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from bert_fast.optim.build import RunOptimizer


def opaque_state(optimizer: RunOptimizer) -> dict[str, Any]:
    """Copies of the state of each parameter, by its number in the order of the groups, and of the groups' settings.

    What an optimizer keeps in `state` under a name, for all parameters together, is there under its name; what it keeps
    elsewhere is there as `RunOptimizer.extra_state`.
    """
    numbers = {parameter: number for number, parameter in enumerate(_parameters(optimizer))}
    by_key: dict[Any, Any] = dict(optimizer.state)
    states = {key if isinstance(key, str) else numbers[key]: entry for key, entry in by_key.items()}
    groups = [{name: value for name, value in group.items() if name != "params"} for group in optimizer.param_groups]
    copied: dict[str, Any] = _mapped(
        {"states": states, "groups": groups, "extra": optimizer.extra_state()},
        lambda tensor: tensor.detach().cpu().clone(),
    )
    return copied


def load_opaque_state(optimizer: RunOptimizer, saved: dict[str, Any]) -> None:
    """Take up what `opaque_state` gave. Raises ValueError where it is of other parameters or groups."""
    parameters = _parameters(optimizer)
    states, groups = saved["states"], saved["groups"]
    numbers = {key for key in states if not isinstance(key, str)}
    if len(groups) != len(optimizer.param_groups) or not numbers <= set(range(len(parameters))):
        raise ValueError("state of another number of parameters or groups")
    optimizer.state.clear()
    by_key: dict[Any, Any] = optimizer.state
    for key, entry in states.items():
        if isinstance(key, str):
            by_key[key] = _moved(entry, parameters[0].device)
        else:
            by_key[parameters[key]] = _moved(entry, optimizer.state_device(parameters[key]))
    for group, settings in zip(optimizer.param_groups, groups, strict=True):
        group.update(_mapped(settings, torch.Tensor.clone))
    optimizer.load_extra_state(saved["extra"])


def _parameters(optimizer: torch.optim.Optimizer) -> list[torch.Tensor]:
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def _moved(value: Any, device: torch.device) -> Any:
    return _mapped(value, lambda tensor: tensor.to(device, copy=True))


def _mapped(value: Any, change: Callable[[torch.Tensor], torch.Tensor]) -> Any:
    """`value` with every tensor in its dicts, lists and tuples changed; of one that is made of others (torchao's), those."""
    if is_traceable_wrapper_subclass(value) and not isinstance(value, DTensor):
        names, context = value.__tensor_flatten__()
        parts = {name: change(getattr(value, name)) for name in names}
        return type(value).__tensor_unflatten__(parts, context, value.shape, value.stride())
    if isinstance(value, torch.Tensor):
        return change(value)
    if isinstance(value, dict):
        return {key: _mapped(each, change) for key, each in value.items()}
    return type(value)(_mapped(each, change) for each in value) if type(value) in (list, tuple) else value
