"""Any optimizer of the package pytorch_optimizer, by the name of its class. The one place that imports this package.

The package has more than a hundred classes, and not all of them can be trained with: some want a closure, a second backward
pass or the model itself. So a class is rehearsed on two small parameters before it gets the model's: it must be able to step on
plain gradients, and to go on from a checkpoint bit for bit.
"""

from __future__ import annotations

import difflib
import inspect
import io
import pickle
import random
from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from bert_fast.command import one_line
from bert_fast.config import OptimizerConfig
from bert_fast.errors import UserError
from bert_fast.optim.build import RunOptimizer, decay_groups, missing_package
from bert_fast.optim.opaque import load_opaque_state, opaque_state

_OURS = ("lr", "weight_decay")
_STEPS = 12  # of each half of a rehearsal: more than most classes wait before they renew what they keep


def build(named_parameters: Iterable[tuple[str, nn.Parameter]], config: OptimizerConfig) -> RunOptimizer:
    """The class `config.class_name` with `config.arguments`, in the groups of `decay_groups`.

    Raises:
        UserError: the package is not installed, has no such class, the class takes no such argument, or cannot train here.
    """
    kind = _class_named(config.class_name or "")
    taken = _check_signature(kind, config)
    arguments = {name: tuple(value) if isinstance(value, list) else value for name, value in config.arguments.items()}
    ours = {name: getattr(config, name) for name in _OURS if name in taken}
    run_class: Any = type(kind.__name__, (kind, RunOptimizer), {"has_opaque_state": True})

    def make(named: Iterable[tuple[str, nn.Parameter]]) -> RunOptimizer:
        groups = decay_groups(named, config.weight_decay)
        if "weight_decay" not in taken:
            groups = [{"params": group["params"]} for group in groups]
        optimizer: RunOptimizer = run_class(groups, **ours, **arguments)
        return optimizer

    reason = _why_not(make, config.lr)
    if reason:
        given = f" with optimizer.arguments={config.arguments}" if config.arguments else ""
        raise UserError(
            f"optimizer.class_name={kind.__name__}{given} cannot train here: {reason}; "
            f"{'change the arguments or ' if given else ''}choose another class"
        )
    return make(named_parameters)


def _class_named(name: str) -> type:
    """The package's class of that name, in any case."""
    try:
        from pytorch_optimizer import get_supported_optimizers, load_optimizer
    except ImportError:
        raise missing_package("pytorch_optimizer") from None
    names: list[str] = get_supported_optimizers()
    if name.lower() in names:
        kind: type = load_optimizer(name.lower())
        return kind
    near = [load_optimizer(each).__name__ for each in difflib.get_close_matches(name.lower()[:100], names, n=3)]
    guess = f"did you mean {' or '.join(near)}?" if near else "its documentation lists them"
    raise UserError(f"optimizer.class_name={one_line(name, 80)}: pytorch_optimizer has no class of this name; {guess}")


def _check_signature(kind: type, config: OptimizerConfig) -> list[str]:
    """Names that the class takes; refuses arguments that it does not take, and a class that wants other things than ours."""
    where = f"optimizer.class_name={kind.__name__}"
    parameters = list(inspect.signature(kind).parameters.values())
    taken = [each.name for each in parameters if each.kind in (each.POSITIONAL_OR_KEYWORD, each.KEYWORD_ONLY)]
    if not taken or taken[0] != "params":
        raise UserError(
            f"{where} takes {taken[0] if taken else 'nothing'} and not parameters alone; choose another class"
        )
    if hasattr(kind, "eval"):
        raise UserError(
            f"{where} evaluates other weights than it trains, which optimizer.name=schedule_free and averaging.method do here; "
            "use one of them or choose another class"
        )
    if "lr" not in taken:
        raise UserError(f"{where} takes no lr, so that the schedule could not set its rate; choose another class")
    if "weight_decay" not in taken and config.weight_decay > 0:
        raise UserError(f"{where} has no weight decay; set optimizer.weight_decay=0")
    for name in config.arguments:
        if name in _OURS:
            raise UserError(f"optimizer.arguments has {name}, which is optimizer.{name} here; set that")
        if name not in taken[1:]:
            able = ", ".join(each for each in taken[1:] if each not in _OURS)
            raise UserError(f"optimizer.arguments has {name}, which {kind.__name__} does not take; it takes {able}")
    return taken


# ---- rehearsal ------------------------------------------------------------------------------------------------------


def _why_not(make: Callable[[Iterable[tuple[str, nn.Parameter]]], RunOptimizer], lr: float) -> str:
    """Why a class cannot train here, found by steps with a matrix and a bias; empty if it can. Random state stays."""
    gradients = torch.Generator().manual_seed(0)
    start = [torch.randn(shape, generator=gradients) for shape in ((4, 3), (4,))]
    steps = [[torch.randn(w.shape, generator=gradients) for w in start] for _ in range(2 * _STEPS)]
    python_state = random.getstate()
    with torch.random.fork_rng(devices=[]):
        try:
            _optimizer_over(make, start)
        except Exception as error:  # of whatever kind the package raises
            return f"it cannot be made ({_text(error)})"
        try:
            return _rehearse(make, start, steps, lr, python_state)
        except pickle.UnpicklingError:
            return "its state has objects that a checkpoint does not hold"
        except Exception as error:
            if "does not require grad" in str(error):
                return "it wants a second backward pass through the gradients, which training here does not make"
            return f"a step on plain gradients fails ({_text(error)})"
        finally:
            random.setstate(python_state)


def _text(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200] or 'without a message'}"


def _rehearse(
    make: Callable[[Iterable[tuple[str, nn.Parameter]]], RunOptimizer],
    start: list[torch.Tensor],
    steps: list[list[torch.Tensor]],
    lr: float,
    python_state: Any,
) -> str:
    before = torch.get_rng_state()
    first, weights = _optimizer_over(make, start)
    _train(first, weights, steps[:1], 0.0)  # as at the start of a warm-up
    _train(first, weights, steps[1:_STEPS], lr)
    buffer = io.BytesIO()
    torch.save(opaque_state(first), buffer)
    halfway, random_state = [w.detach().clone() for w in weights], torch.get_rng_state()
    _train(first, weights, steps[_STEPS:], lr)
    draws = not torch.equal(torch.get_rng_state(), before)
    if random.getstate() != python_state:
        return "it draws Python's random numbers, which a checkpoint does not hold"
    if draws and dist.is_initialized() and dist.get_world_size() > 1:
        return "it draws random numbers, which are others on every rank, so that weights would differ between ranks"
    if not all(torch.isfinite(w).all() for w in weights):
        return f"{2 * _STEPS} steps on random gradients end in weights that are not finite"
    if all(torch.equal(w, s) for w, s in zip(weights, start, strict=True)):
        return f"{2 * _STEPS} steps at optimizer.lr={lr:g} change no weight (a class that finds its own step size wants 1.0)"
    buffer.seek(0)
    second, resumed = _optimizer_over(make, halfway)
    load_opaque_state(second, torch.load(buffer, weights_only=True))
    torch.set_rng_state(random_state)
    _train(second, resumed, steps[_STEPS:], lr)
    if not all(torch.equal(w, r) for w, r in zip(weights, resumed, strict=True)):
        return "it keeps state outside of `state` and `param_groups`, so that a resumed run would be another one"
    return ""


def _optimizer_over(
    make: Callable[[Iterable[tuple[str, nn.Parameter]]], RunOptimizer], start: list[torch.Tensor]
) -> tuple[RunOptimizer, list[nn.Parameter]]:
    weights = [nn.Parameter(value.clone()) for value in start]
    return make(zip(("weight", "bias"), weights, strict=True)), weights


def _train(optimizer: RunOptimizer, weights: list[nn.Parameter], steps: list[list[torch.Tensor]], lr: float) -> None:
    for gradients in steps:
        for weight, gradient in zip(weights, gradients, strict=True):
            weight.grad = gradient.clone()
        for group in optimizer.param_groups:
            group["lr"] = lr
        optimizer.step()
