"""`memory.budget_gib`: the fastest way to train within a budget, of combinations of switches that round nothing.

Times are modelled: matrix products at one rate, passes over memory, messages and copies to the host at others. They rank
candidates; a benchmark on the machine says what a step takes (scripts/memory_poc.py).
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from bert_fast.config import Config, as_plain
from bert_fast.config.choices import ENGINES, RECOMPUTE, WIRE_FORMATS, find
from bert_fast.config.load import config_from_tree
from bert_fast.errors import UserError
from bert_fast.memory.estimate import MemoryEstimate, chain_of, estimate
from bert_fast.memory.remat import Chain, Plan, fastest_within, keep_all, least_peak, pareto
from bert_fast.memory.stages import Hardware, longest_micro_batch
from bert_fast.memory.state import num_parameters, num_shards

_GIB, _MIB = 2**30, 2**20
_UNITS = {"gib": 1.0, "gb": 1e9 / 2**30, "mib": 2**-10, "": 1.0}  # in GiB
_HIDDEN = 0.8  # of backward's time, in which messages are on the wire
_MEASURED = (
    1.01  # what runs have taken at most over their estimate (results/memory/peaks.json), but for measured stages
)
_MARGIN = 1.03  # of activations: a run measures its stages, and they may be larger than by their shapes
_LARGEST = 2**13  # samples of a micro-batch that are tried
_LOSSY_PASSES = 3.0  # passes of a rounded optimizer step over its numbers, of an exact one's


def gib(text: str) -> float:
    """80GiB, 24GB, 512MiB or a number of GiB. Raises UserError."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-zA-Z]*)\s*", text)
    if match is None or match[2].lower() not in _UNITS or float(match[1]) <= 0:
        raise UserError(f"'{text}' is not a size of memory; write it as 80GiB, 24GB or 512MiB")
    return float(match[1]) * _UNITS[match[2].lower()]


@dataclass(frozen=True)
class Machine:
    """Rates of a rank, for times of steps.

    flops_per_s:         of matrix products as a step reaches them
    memory_bytes_per_s:  of the device's memory
    network_bytes_per_s: of a rank to the others
    host_bytes_per_s:    between device and host
    launch_s:            that a stage takes however small it is, in forward or backward
    """

    flops_per_s: float
    memory_bytes_per_s: float
    network_bytes_per_s: float
    host_bytes_per_s: float
    launch_s: float


# Of one core, and of an H100 with 400 Gbit/s beside it; scripts/fit_memory.py --measure measures the first two here
MACHINES = {"cpu": Machine(5e10, 5e9, 1e9, 5e9, 2e-5), "cuda": Machine(3e14, 2.5e12, 5e10, 2.5e10, 6e-5)}


@dataclass(frozen=True)
class Candidate:
    """A config with other switches: what they are, what it takes, and how long a step of it is.

    least_bytes: with the plan of least peak
    is_exact:    whether it trains to the same weights, up to the order of sums and of dropout's random numbers
    """

    changes: dict[str, Any]
    config: Config
    memory: MemoryEstimate
    plan: Plan
    step_s: float
    least_bytes: int
    is_exact: bool

    def text(self) -> str:
        """Switches, memory and time, on one line."""
        again, stages = len(self.plan.recomputed), self.plan.segments[-1].end
        lossy = "" if self.is_exact else " (other numbers)"
        return (
            f"{self.memory.total / _GIB:.2f} GiB, {1e3 * self.step_s:,.1f} ms a step: {_changes_text(self.changes)}, {again} "
            f"of {stages} stages run twice{lossy}"
        )


@dataclass(frozen=True)
class Fit:
    """What was found for a budget: the fastest that is exact, others that fit, and why some could not be had."""

    budget_bytes: int
    best: Candidate
    runners_up: list[Candidate]
    refused: dict[str, str]

    def changes(self) -> dict[str, Any]:
        """All settings of the best one: a run with them chooses nothing any more."""
        if self.best.config.memory.recompute == "none":
            return {**self.best.changes, "memory.recompute": "none", "memory.budget_gib": None}
        return {**self.best.changes, "memory.recompute": "budget", "memory.budget_gib": self.budget_bytes / _GIB}

    def fragment(self) -> dict[str, Any]:
        """The same as a piece of a config, nested."""
        tree: dict[str, Any] = {}
        for name, value in self.changes().items():
            section, _, field = name.partition(".")
            tree.setdefault(section, {})[field] = value
        return tree


class Planner:
    """Evaluates configs that differ in switches; the curve of peaks and times of a micro-batch is made once.

    Args:
        hardware: how the model is computed.
        machine: rates for times.
    """

    def __init__(self, hardware: Hardware, machine: Machine) -> None:
        self.hardware = replace(hardware, flops_per_s=machine.flops_per_s)
        self.machine = machine
        self._curves: dict[Chain, list[Plan]] = {}

    def evaluate(self, config: Config, changes: dict[str, Any], budget_bytes: int, is_exact: bool = True) -> Candidate:
        """Memory and time of a config: with `memory.recompute: budget` as little as the budget allows is computed again, or the
        least peak; with `none` nothing."""
        batch, on_cpu = longest_micro_batch(config), self.hardware.on_cpu
        chain = chain_of(config, batch, self.hardware)
        plan = smallest = keep_all(chain)
        if config.memory.recompute != "none":
            smallest = least_peak(chain)
            fixed = estimate(config, chain, smallest, on_cpu=on_cpu).fixed
            room = int((budget_bytes - fixed) / _MARGIN)
            if smallest.peak_bytes > room:
                plan = smallest
            elif plan.peak_bytes > room:
                if chain not in self._curves:
                    self._curves[chain] = pareto(chain, max_points=64)
                plan = fastest_within(self._curves[chain], room)
        least, memory = (estimate(config, chain, each, on_cpu=on_cpu) for each in (smallest, plan))
        seconds = step_seconds(config, chain, plan, self.machine)
        needed = least.fixed + int(_MARGIN * least.activations)
        return Candidate(changes, config, memory, plan, seconds, needed, is_exact)


def fit(config: Config, budget_gib: float, hardware: Hardware, machine: Machine, *, may_move_state: bool = True) -> Fit:
    """The fastest exact candidate within the budget.

    Args:
        may_move_state: whether the optimizer's state may go to the host, which a checkpoint of another place does not fit.

    Raises:
        UserError: nothing fits, with the least budget of any.
    """
    budget_bytes, planner = int(budget_gib * _GIB), Planner(hardware, machine)
    found: list[Candidate] = []
    refused: dict[str, str] = {}
    least: dict[bool, Candidate] = {}
    for changes, is_exact in _switches(config, hardware.on_cpu, may_move_state):
        try:
            changed = _with_recomputation(config, changes, budget_gib)
        except UserError as error:
            refused.setdefault(_switch_names(changes), str(error).removeprefix("config: "))
            continue
        candidate = planner.evaluate(changed, changes, budget_bytes, is_exact)
        if is_exact not in least or candidate.least_bytes < least[is_exact].least_bytes:
            least[is_exact] = candidate
        if candidate.memory.fixed + _MARGIN * candidate.memory.activations <= budget_bytes:
            found.append(candidate)
    found.sort(key=lambda each: each.step_s)
    best = next((each for each in found if each.is_exact), None)
    if best is None:
        raise UserError(_too_small(budget_gib, least, found))
    return Fit(budget_bytes, best, [each for each in found if each is not best], refused)


def _with_recomputation(config: Config, changes: dict[str, Any], budget_gib: float) -> Config:
    """The config as a run would have it: with recomputation by the budget, or none where it cannot be had.

    Raises UserError where the changes themselves cannot be had.
    """
    try:
        return with_changes(config, {**changes, "memory.recompute": "budget", "memory.budget_gib": budget_gib})
    except UserError:
        return with_changes(config, {**changes, "memory.recompute": "none"})


def _too_small(budget_gib: float, least: dict[bool, Candidate], found: list[Candidate]) -> str:
    text = f"memory.budget_gib={budget_gib:g} is too small for this model and batch"
    if True in least:
        smallest = least[True]
        again = "" if smallest.config.memory.recompute == "none" else " and as much recomputation as there is"
        text += (
            f"; of what was tried the least is {(smallest.least_bytes + _MIB) / _GIB:.3f} GiB, with "
            f"{_changes_text(smallest.changes)}{again}; set it to that or more, or use more ranks"
        )
    if found:
        text += f"; with other numbers {_changes_text(found[0].changes)} fits"
    return text


def largest_micro_batch(config: Config, budget_gib: float, hardware: Hardware) -> int:
    """The largest micro-batch with which a config stays within a budget, with its own way to recompute; 0: none does.

    The global batch is not looked at: it follows from micro-batch, ranks and accumulation.

    Args:
        config: with any `memory.recompute` but `budget`.

    Raises:
        UserError: its settings do not go with other micro-batches.
    """
    budget_bytes, how = int(budget_gib * _GIB), config.memory.recompute

    def fits(size: int) -> bool:
        batch = {"batch.micro_batch_size": size, "batch.gradient_accumulation_steps": 1}
        world = config.system.world_size * config.batch.virtual_ranks
        changed = with_changes(config, {**batch, "batch.global_batch_size": size * world})
        chain = chain_of(changed, longest_micro_batch(changed), hardware)
        plan: Plan = keep_all(chain) if how == "none" else find(RECOMPUTE, how)(chain, None)
        return _MEASURED * estimate(changed, chain, plan, on_cpu=hardware.on_cpu).total <= budget_bytes

    if not fits(1):
        return 0
    low, high = 1, 2
    while high <= _LARGEST and fits(high):
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def step_seconds(config: Config, chain: Chain, plan: Plan, machine: Machine) -> float:
    """A step's time by the rates of a machine."""
    parameters, world = num_parameters(config.model), config.system.world_size
    micro_batches = config.batch.micro_batches_per_step
    launches = machine.launch_s * (3 * len(chain.stages) + len(plan.recomputed))
    # Each micro-batch reads weights and adds to gradients
    passes = 4 * 4 * parameters / machine.memory_bytes_per_s
    backward = 2 * chain.forward_s + plan.recompute_s
    compute = micro_batches * (chain.forward_s + backward + launches + passes)
    if config.memory.offload_activations:
        saved = sum(stage.saved_bytes + stage.output_bytes for stage in chain.stages)
        compute += micro_batches * 2 * saved / machine.host_bytes_per_s  # on the stream of the computation
    updated = parameters / num_shards(config)
    factor = _LOSSY_PASSES if config.optimizer.state_dtype != "fp32" else 1.0
    update = factor * updated * 28 / machine.memory_bytes_per_s
    if config.optimizer.state_on_host:
        update += 2 * 8 * updated / machine.host_bytes_per_s
    if config.memory.offload_weights:
        update += 2 * 4 * updated / machine.host_bytes_per_s
    return compute + update + _exposed_seconds(config, parameters, world, backward, chain.forward_s, machine)


def _exposed_seconds(
    config: Config, parameters: int, world: int, backward: float, forward: float, machine: Machine
) -> float:
    """Of messages, what backward and the next forward pass do not hide."""
    if world == 1:
        return 0.0
    communication, share = config.communication, (world - 1) / world
    wire = {"fp32": 4.0, "bf16": 2.0, "fp16": 2.0}.get(communication.reduce_dtype, 1.0)
    one_way = share * parameters / machine.network_bytes_per_s
    if ENGINES[communication.engine].shards:
        gathers = 2 if communication.reshard_after_forward else 1
        times = config.batch.micro_batches_per_step
        return max(0.0, one_way * (wire + 4 * gathers * times) - _HIDDEN * times * (backward + forward))
    if communication.shard_optimizer:
        return max(0.0, one_way * wire - _HIDDEN * backward) + max(0.0, one_way * 4 - _HIDDEN * forward)
    return max(0.0, 2 * one_way * wire - _HIDDEN * backward)


def with_changes(config: Config, changes: dict[str, Any]) -> Config:
    """The config with settings replaced by their names. Raises UserError where they do not fit together."""
    tree = as_plain(config)
    tree["memory"]["budget_gib"] = None
    for name, value in changes.items():
        section, _, field = name.partition(".")
        tree[section][field] = value
    return config_from_tree(tree)


def _switches(config: Config, on_cpu: bool, may_move_state: bool) -> Iterator[tuple[dict[str, Any], bool]]:
    """Every combination as changes of the config, and whether it is exact. None changes what a step trains on."""
    for sharding in _shardings(config, on_cpu):
        for state, is_exact in _states(config, on_cpu or not may_move_state):
            for released in _released(config, sharding):
                for offload in [{}] if on_cpu else [{}, {"memory.offload_activations": True}]:
                    for micro_batch in _micro_batches(config):
                        yield {**micro_batch, **sharding, **state, **released, **offload}, is_exact


def _released(config: Config, sharding: dict[str, Any]) -> list[dict[str, Any]]:
    """Gradients that come and go, where the engine can do that."""
    can = not sharding and config.communication.engine == "bucketed" and not config.communication.shard_optimizer
    return [{}, {"memory.release_gradients": True}] if can and not config.memory.release_gradients else [{}]


def _micro_batches(config: Config) -> Iterator[dict[str, Any]]:
    samples = config.batch.samples_per_rank
    for size in range(samples, 0, -1):
        if samples % size == 0:
            own = size == config.batch.micro_batch_size
            yield {} if own else {"batch.micro_batch_size": size, "batch.gradient_accumulation_steps": samples // size}


def _shardings(config: Config, on_cpu: bool) -> Iterator[dict[str, Any]]:
    yield {}
    communication, system = config.communication, config.system
    is_fsdp = ENGINES[communication.engine].shards
    if is_fsdp and not on_cpu and not config.memory.offload_weights:
        yield {"memory.offload_weights": True}
    if is_fsdp or system.world_size == 1:
        return
    # A sum that is encoded anew is not the same in parts
    if not communication.shard_optimizer and not WIRE_FORMATS[communication.reduce_dtype].sends_sums:
        yield {"communication.shard_optimizer": True}
    fsdp = {"communication.engine": "fsdp", "communication.shard_optimizer": False}
    for name in ("bucket_mb", "min_bucket_mb", "max_bucket_mb"):  # which it does not read
        fsdp[f"communication.{name}"] = type(communication).model_fields[name].default
    nodes = [False, True] if 1 < system.node_size < system.world_size else [False]
    for within, reshard in itertools.product(nodes, (False, True)):
        parts = {"communication.reshard_after_forward": reshard, "communication.shard_within_node": within}
        yield {**fsdp, **parts}
        if reshard and not on_cpu:
            yield {**fsdp, **parts, "memory.offload_weights": True}


def _states(config: Config, on_cpu: bool) -> Iterator[tuple[dict[str, Any], bool]]:
    yield {}, True
    if config.optimizer.name != "adamw" or config.optimizer.state_dtype != "fp32" or config.optimizer.state_on_host:
        return
    if not on_cpu:
        yield {"optimizer.state_on_host": True}, True
    for name in ("bf16", "int8", "int4"):
        yield {"optimizer.state_dtype": name}, False


def _switch_names(changes: dict[str, Any]) -> str:
    """How weights and gradients are kept, the rest of the switches aside: by that a candidate is refused."""
    names = (
        "communication.engine", "communication.shard_optimizer", "communication.reshard_after_forward",
        "communication.shard_within_node", "memory.release_gradients", "memory.offload_weights", "memory.offload_activations",
    )  # fmt: skip
    return _changes_text({name: value for name, value in changes.items() if name in names and value is not False})


def _changes_text(changes: dict[str, Any]) -> str:
    return " ".join(f"{name}={_shown(value)}" for name, value in changes.items()) or "these settings"


def _shown(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else f"{value}"
