"""An optimizer over this rank's shards, with the checkpoint format of the whole one."""

from __future__ import annotations

import itertools
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from bert_fast.communication.sharded import ShardedReducer
from bert_fast.config import OptimizerConfig
from bert_fast.optim.build import build_optimizer, has_decay
from bert_fast.optim.lamb import Lamb
from bert_fast.parts import declare_parts, parts_of


class ShardedOptimizer:
    """Wraps the optimizer of a config over the pieces that this rank holds.

    `state_dict` gathers (a collective) what the unsharded optimizer would have, and `load_state_dict` takes that: a
    checkpoint can be read by any number of ranks, sharded or not.
    """

    def __init__(
        self, engine: ShardedReducer, named_parameters: list[tuple[str, nn.Parameter]], config: OptimizerConfig
    ):
        self._engine, self._names = engine, [name for name, _ in named_parameters]
        self._shapes = [p.shape for _, p in named_parameters]
        self._pieces = []
        self._parts_of: dict[int, list[int]] = {}  # of the model's parts (`bert_fast.parts`), those that a piece holds
        ends = [_part_ends(p) for _, p in named_parameters]
        first = list(itertools.accumulate(map(len, ends), initial=0))  # number of each parameter's first part
        self._num_parts = first[-1]
        for piece in engine.pieces:
            parameter = nn.Parameter(engine.weight_of(piece))
            parameter.grad = engine.gradient_of(piece)
            held = _parts_between(ends[piece.parameter], piece.begin, piece.end)
            declare_parts(parameter, list(held.values()))
            self._pieces.append(parameter)
            self._parts_of[id(parameter)] = [first[piece.parameter] + number for number in held]
        named = [(self._names[piece.parameter], p) for piece, p in zip(engine.pieces, self._pieces, strict=True)]
        self.inner = build_optimizer(named, config)
        if isinstance(self.inner, Lamb):
            self.inner.share_squares = self._share_squares

    def parts(self) -> list[list[nn.Parameter]]:
        """The pieces of every bucket, for updates by bucket."""
        parts: list[list[nn.Parameter]] = [[] for _ in self._engine.layout.buckets]
        for piece, parameter in zip(self._engine.pieces, self._pieces, strict=True):
            parts[piece.bucket].append(parameter)
        return parts

    def held(self) -> list[tuple[str, int, int, nn.Parameter]]:
        """What this rank updates: (parameter's name, first element, elements of the whole parameter, the piece)."""
        return [
            (self._names[piece.parameter], piece.begin, self._shapes[piece.parameter].numel(), parameter)
            for piece, parameter in zip(self._engine.pieces, self._pieces, strict=True)
        ]

    def state_dict(self) -> dict[str, Any]:
        """As `build_optimizer(all parameters).state_dict()`, on the host. A collective; only rank 0 gets the state."""
        decayed = [i for i, name in enumerate(self._names) if has_decay(name)]
        order = decayed + [i for i, name in enumerate(self._names) if not has_decay(name)]
        groups, start = [], 0
        for group, count in zip(self.inner.param_groups, (len(decayed), len(order) - len(decayed)), strict=True):
            settings = {key: value for key, value in group.items() if key != "params"}
            groups.append({**settings, "params": list(range(start, start + count))})
            start += count
        place_of = {index: place for place, index in enumerate(order)}
        steps = self.steps()
        state: dict[int, dict[str, torch.Tensor]] = {}
        if float(steps) == 0.0:
            return {"state": state, "param_groups": groups}
        for name in ("exp_avg", "exp_avg_sq"):  # one bucket at a time: a device may not hold the whole state
            for number, bucket in enumerate(self._engine.layout.buckets):
                whole = self._engine.gather_bucket(number, self._shard_of(number, name))
                if dist.get_rank() == 0:
                    host = whole.cpu()
                    for index in bucket.parameters:
                        start = self._engine.layout.offsets[index] - bucket.start
                        values = host[start : start + self._engine.layout.numel[index]]
                        entry = state.setdefault(place_of[index], {"step": steps.clone()})
                        entry[name] = values.view(self._shapes[index]).clone()
        return {"state": state, "param_groups": groups}

    def load_state_dict(self, whole: dict[str, Any]) -> None:
        """Take this rank's shards of an unsharded state."""
        order = sorted(range(len(self._names)), key=lambda i: (not has_decay(self._names[i]), i))
        place_of = {index: place for place, index in enumerate(order)}
        state, number_of = {}, {}
        own = [p for group in self.inner.param_groups for p in group["params"]]
        for number, parameter in enumerate(own):
            number_of[id(parameter)] = number
        for piece, parameter in zip(self._engine.pieces, self._pieces, strict=True):
            entry = whole["state"].get(place_of[piece.parameter])
            if entry is not None:
                state[number_of[id(parameter)]] = {
                    name: value if value.dim() == 0 else value.reshape(-1)[piece.begin : piece.end].clone()
                    for name, value in entry.items()
                }
        mine = self.inner.state_dict()["param_groups"]
        groups = [
            {**{key: value for key, value in theirs.items() if key != "params"}, "params": ours["params"]}
            for ours, theirs in zip(mine, whole["param_groups"], strict=True)
        ]
        self.inner.load_state_dict({"state": state, "param_groups": groups})

    def steps(self) -> torch.Tensor:
        """The step count, 0-dim on the host; the same for all tensors and ranks. A collective."""
        entries = [self.inner.state[p] for p in self._pieces if p in self.inner.state]
        count = max((float(entry["step"]) for entry in entries), default=0.0)
        shared = torch.tensor(count, dtype=torch.float64, device=self._engine.gradients.buffer.device)
        dist.all_reduce(shared, op=dist.ReduceOp.MAX)
        return shared.cpu().to(entries[0]["step"].dtype if entries else torch.float64)

    def _shard_of(self, number: int, name: str) -> torch.Tensor:
        """This rank's shard of a moment of a bucket."""
        shard = torch.zeros_like(self._engine.reduced(number))
        first = self._engine.shard_start(number)
        for piece, parameter in zip(self._engine.pieces, self._pieces, strict=True):
            if piece.bucket == number:
                start = self._engine.layout.offsets[piece.parameter] - first
                shard[start + piece.begin : start + piece.end] = self.inner.state[parameter][name]
        return shard

    def _share_squares(self, parameters: list[torch.Tensor], squares: torch.Tensor | None) -> torch.Tensor:
        """Sums over ranks: squares [2, n] of the parts that these pieces hold to those of the whole parts. A collective.

        A rank without pieces takes part with zeros, of the same type and on the same device as the others.
        """
        buffer = self._engine.gradients.buffer
        total = torch.zeros(2, self._num_parts, dtype=buffer.dtype, device=buffer.device)
        numbers = [number for p in parameters for number in self._parts_of[id(p)]]
        index = torch.tensor(numbers, dtype=torch.int64, device=buffer.device)
        if squares is not None:
            total[:, index] = squares
        dist.all_reduce(total, group=self._engine.small_group)
        return total[:, index]


def _part_ends(parameter: torch.Tensor) -> list[int]:
    """Where each part of a parameter ends in its flattened elements."""
    row = parameter.numel() // max(1, parameter.shape[0])
    return [row * end for end in itertools.accumulate(parts_of(parameter))]


def _parts_between(ends: list[int], begin: int, end: int) -> dict[int, int]:
    """Parts with elements in [begin, end), in order, and how many they have there."""
    found = {}
    for number, (low, high) in enumerate(itertools.pairwise([0, *ends])):
        held = min(high, end) - max(low, begin)
        if held > 0:
            found[number] = held
    return found
