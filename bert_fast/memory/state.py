"""What a run keeps from step to step beside weights and gradients: the optimizer's state, and what was not sent yet.

Parts by name, in bytes, from shapes and settings alone; `--dry-run` prints them for each parameter.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from bert_fast.compression.error_feedback import ErrorFeedback
from bert_fast.compression.lowrank import has_smaller_factors
from bert_fast.compression.topk import TopK
from bert_fast.config import Config, ModelConfig, OptimizerConfig
from bert_fast.config.choices import ENGINES, OPTIMIZERS, WIRE_FORMATS, WindowOfGradients
from bert_fast.integers import ceil_div

_MOMENT_BYTES = {
    "fp32": 4.0,
    "bf16": 2.0,
    "int8": 1 + 4 / 128,
    "int4": 0.5 + 4 / 128,
}  # of a number, with its block's scale
_SPARSE_BYTES = 4  # of an entry: a place of 16 bits, and bf16


@dataclass(frozen=True)
class ParameterGroup:
    """Parameters of an encoder layer, of the embeddings or of the heads.

    name:     as `optim.build.layer_of` has it
    numel:    of all
    matrices: rows and columns of those with two dimensions
    """

    name: str
    numel: int
    matrices: tuple[tuple[int, int], ...]


def parameter_groups(config: ModelConfig) -> Iterator[ParameterGroup]:
    """The model's parameters, the tied decoder counted once, group by group."""
    width, inner = config.hidden_size, config.intermediate_size
    tables = tuple((rows, width) for rows in (config.vocab_size, config.max_positions, config.type_vocab_size))
    yield _group("embeddings", tables, 2 * width)
    layer = ((3 * width, width), (width, width), (inner, width), (width, inner))
    for number in range(config.num_layers):
        yield _group(f"layers.{number}", layer, 9 * width + inner)
    heads, vectors = [(width, width)], 3 * width + config.vocab_size
    if config.next_sentence:
        heads, vectors = [*heads, (width, width), (2, width)], vectors + width + 2
    yield _group("heads", tuple(heads), vectors)


def _group(name: str, matrices: tuple[tuple[int, int], ...], num_in_vectors: int) -> ParameterGroup:
    return ParameterGroup(name, sum(rows * columns for rows, columns in matrices) + num_in_vectors, matrices)


def num_parameters(config: ModelConfig) -> int:
    """Trainable parameters, the tied decoder counted once."""
    return sum(group.numel for group in parameter_groups(config))


def num_matrix_parameters(config: ModelConfig) -> int:
    """Of them, those in the encoder's matrices: its projections without their biases."""
    layers = (group for group in parameter_groups(config) if group.name.startswith("layers"))
    return sum(rows * columns for group in layers for rows, columns in group.matrices)


def num_shards(config: Config) -> int:
    """Ranks over which an optimizer's state is divided."""
    communication, system = config.communication, config.system
    if ENGINES[communication.engine].shards:
        return system.node_size if communication.shard_within_node else system.world_size
    return system.world_size if communication.shard_optimizer else 1


def rank_notes(config: Config) -> list[str]:
    """What to say of a rank at which matrices of the model have no smaller factors: they are then kept, or sent, whole."""
    found = []
    window = OPTIMIZERS[config.optimizer.name].window
    if window is not None and window.stored_as == "low_rank":
        found.append((f"optimizer.rank={config.optimizer.rank}", config.optimizer.rank, "kept"))
    if config.communication.reduce_dtype == "powersgd":
        rank = config.communication.powersgd_rank
        found.append((f"communication.powersgd_rank={rank}", rank, "sent"))
    shapes = [shape for group in parameter_groups(config.model) for shape in group.matrices]
    notes = []
    for setting, rank, verb in found:
        whole = [shape for shape in shapes if not has_smaller_factors(*shape, rank)]
        if whole:
            rows, columns = min(whole, key=min)
            notes.append(
                f"{setting}: {len(whole)} of {len(shapes)} matrices (such as {rows} x {columns}) have no factors of that rank "
                f"that are smaller, and are {verb} whole"
            )
    return notes


_OF_EVERY_RANK = "products of its rows"  # of the window: the one part that sharding does not divide


def optimizer_state(model: ModelConfig, optimizer: OptimizerConfig, shards: int = 1) -> dict[str, int] | None:
    """Bytes of a rank's optimizer state, part by part; None where the table cannot say how much there is.

    Args:
        shards: ranks over which it is divided.
    """
    parts = _whole_state(model, optimizer)
    if parts is None:
        return None
    return {name: count if name == _OF_EVERY_RANK else ceil_div(count, shards) for name, count in parts.items()}


def _whole_state(model: ModelConfig, optimizer: OptimizerConfig) -> dict[str, int] | None:
    choice = OPTIMIZERS[optimizer.name]
    if choice.window is not None:
        return _window_state(model, optimizer, choice.window)
    if choice.state_values is None:
        return None
    matrices = num_matrix_parameters(model)
    of_matrices = choice.state_values if choice.matrix_values is None else choice.matrix_values
    values = choice.state_values * (num_parameters(model) - matrices) + of_matrices * matrices
    if optimizer.state_on_host:
        return {"moments, on the host": 0}
    return {"moments": int(_MOMENT_BYTES[optimizer.state_dtype] * values)}


def _window_state(model: ModelConfig, optimizer: OptimizerConfig, kind: WindowOfGradients) -> dict[str, int]:
    m = optimizer.window or kind.rows
    groups = list(parameter_groups(model))
    if optimizer.precondition == "model":
        matrices = tuple(shape for group in groups for shape in group.matrices)
        groups = [ParameterGroup("model", sum(group.numel for group in groups), matrices)]
    parts = {"window": 0, _OF_EVERY_RANK: 8 * m * m * len(groups)}
    bases = 0
    for group in groups:
        rest = group.numel
        if kind.stored_as == "sparse":
            blocks, selected = TopK(optimizer.density, optimizer.numbers_per_block).shape(group.numel)
            parts["window"] += m * blocks * selected * _SPARSE_BYTES
            continue
        if kind.stored_as == "low_rank":
            for rows, columns in group.matrices:
                if has_smaller_factors(rows, columns, optimizer.rank):
                    parts["window"] += 4 * m * optimizer.rank * (rows + columns)
                    bases += 4 * optimizer.rank * columns
                    rest -= rows * columns
        parts["window"] += 4 * m * rest
    numel = num_parameters(model)
    if kind.stored_as != "whole" and optimizer.error_feedback:
        storage = optimizer.residual_dtype or kind.residual_dtype
        held = [ErrorFeedback(group.numel, storage=storage, device="meta", may_skip=False) for group in groups]
        parts["residual"] = sum(each.num_bytes for each in held)
    if bases:
        parts["bases of the power iteration"] = bases
    if optimizer.momentum and "momentum" in OPTIMIZERS[optimizer.name].settings:
        parts["average of updates"] = 4 * numel
    return parts


def residual_bytes(config: Config) -> int:
    """Bytes of what a rank's wire format keeps of gradients that it has not sent: two copies, as a step may be skipped."""
    communication, system = config.communication, config.system
    choice = WIRE_FORMATS[communication.reduce_dtype]
    if choice.is_cast or system.world_size == 1:
        return 0
    kept = 1.0  # of a gradient
    if choice.sends_sums:
        kept += 1 / system.world_size
        if choice.by_node and 1 < system.node_size < system.world_size:
            kept += 1 / system.node_size
    whole = ErrorFeedback(num_parameters(config.model), storage=communication.residual_dtype, device="meta")
    return int(kept * whole.num_bytes)
