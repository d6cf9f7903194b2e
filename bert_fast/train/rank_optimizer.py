"""The optimizer of one rank: over all of the model, or over this rank's shards of it."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

from bert_fast.communication.engine import Engine, UpdatedSlice
from bert_fast.config import OptimizerConfig
from bert_fast.optim.build import build_optimizer
from bert_fast.parts import declare_parts, parts_of
from bert_fast.train.collectives import gather_values


@dataclass(frozen=True)
class OptimizerSlice:
    """What the optimizer updates: elements [begin, begin + parameter.numel()) of the model's flattened parameter `name`.

    `numel` counts the elements of the whole parameter.
    """

    name: str
    begin: int
    numel: int
    parameter: nn.Parameter


class RankOptimizer:
    """The config's optimizer over what this rank updates, and which part of the model each of its parameters is.

    `optimizer` is a plain torch optimizer. A checkpoint holds its state per element of the model's parameters, so that any
    number of ranks, sharded or not, can take it up.
    """

    def __init__(
        self, engine: Engine, named_parameters: list[tuple[str, nn.Parameter]], config: OptimizerConfig
    ) -> None:
        self._engine = engine
        updated = engine.updated_slices()
        parts = _PartTable(named_parameters, updated) if engine.is_sharded else None
        slices = [
            OptimizerSlice(name, each.begin, whole.numel(), each.parameter)
            for each in updated
            for name, whole in [named_parameters[each.index]]
        ]
        place = {name: number for number, (name, _) in enumerate(named_parameters)}
        # A whole model is kept in its own order, as files and torch's state have it
        self.slices = slices if engine.is_sharded else sorted(slices, key=lambda each: place[each.name])
        self._by_bucket: list[list[torch.Tensor]] = [[] for _ in engine.layout.buckets]
        for each in updated:
            self._by_bucket[each.bucket].append(each.parameter)
        self.optimizer = build_optimizer([(each.name, each.parameter) for each in self.slices], config)
        if parts is not None:
            self.optimizer.share_squares = lambda parameters, squares: parts.shared(engine, parameters, squares)
            self.optimizer.share_sums = lambda group_of, sums, width: _shared_sums(
                engine, named_parameters, group_of, sums, width
            )

    @property
    def parameters_by_bucket(self) -> list[list[torch.Tensor]]:
        """What is updated of each bucket, for updates per bucket."""
        return self._by_bucket

    def scalars(self) -> dict[str, dict[str, float]]:
        """`RunOptimizer.scalars` of the whole model, the same on all ranks. A collective where it is sharded."""
        mine = self.optimizer.scalars()
        if not self._engine.is_sharded:
            return mine
        merged: dict[str, dict[str, float]] = {}
        for theirs in gather_values(mine):  # a rank may have no slice of some kind of parameter
            merged |= {kind: values for kind, values in theirs.items() if kind not in merged}
        return dict(sorted(merged.items()))


class _PartTable:
    """The model's parts (`bert_fast.parts`: query, key and value of one tensor), and which of them each slice holds."""

    def __init__(self, named_parameters: list[tuple[str, nn.Parameter]], updated: list[UpdatedSlice]) -> None:
        ends = [_part_ends(p) for _, p in named_parameters]
        first = list(itertools.accumulate(map(len, ends), initial=0))  # number of each parameter's first part
        self._num_parts = first[-1]
        self._numbers: dict[int, list[int]] = {}
        reference = named_parameters[0][1]
        self._dtype, self._device = reference.dtype, reference.device
        for each in updated:
            held = _parts_between(ends[each.index], each.begin, each.begin + each.parameter.numel())
            declare_parts(each.parameter, list(held.values()))
            self._numbers[id(each.parameter)] = [first[each.index] + number for number in held]

    def shared(self, engine: Engine, parameters: list[torch.Tensor], squares: torch.Tensor | None) -> torch.Tensor:
        """Sums over ranks: squares [2, n] of the parts that these slices hold, to those of the whole parts. A collective.

        A rank without slices takes part with zeros, of the same type and on the same device as the others.
        """
        total = torch.zeros(2, self._num_parts, dtype=self._dtype, device=self._device)
        numbers = [number for p in parameters for number in self._numbers[id(p)]]
        index = torch.tensor(numbers, dtype=torch.int64, device=self._device)
        if squares is not None:
            total[:, index] = squares
        engine.share_sums(total)
        return total[:, index]


def _shared_sums(
    engine: Engine,
    named_parameters: list[tuple[str, nn.Parameter]],
    group_of: Callable[[str], str],
    sums: dict[str, torch.Tensor],
    width: int,
) -> dict[str, torch.Tensor]:
    """Sums over ranks: [width] of this rank's pieces, by group, to those of every group of the model. A collective."""
    groups = list(dict.fromkeys(group_of(name) for name, _ in named_parameters))  # in one order on all ranks
    nothing = torch.zeros(width, dtype=torch.float64, device=named_parameters[0][1].device)
    total = torch.stack([sums.get(group, nothing).to(torch.float64) for group in groups])
    engine.share_sums(total)
    return dict(zip(groups, total.unbind(), strict=True))


def _part_ends(parameter: torch.Tensor) -> list[int]:
    """Where each part of a parameter ends in its flattened elements."""
    row = parameter.numel() // max(1, parameter.shape[0])
    return [row * end for end in itertools.accumulate(parts_of(parameter))]


def _parts_between(ends: list[int], begin: int, end: int) -> dict[int, int]:
    """Parts with elements in [begin, end), in order, and how many they have there."""
    held_by = {}
    for number, (low, high) in enumerate(itertools.pairwise([0, *ends])):
        held = min(high, end) - max(low, begin)
        if held > 0:
            held_by[number] = held
    return held_by
