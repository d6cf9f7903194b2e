"""An optimizer that is stepped over some of its parameters at a time, as their gradients arrive."""

from __future__ import annotations

from collections.abc import Sequence

import torch


class BucketwiseOptimizer:
    """Parts of an optimizer's parameters, each stepped once a step, in any order: the same as one whole step.

    For optimizers that treat every tensor on its own (AdamW, LAMB). State and settings stay the optimizer's.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, parts: Sequence[Sequence[torch.Tensor]]) -> None:
        """
        Args:
            parts: parameters of each part; together all of the optimizer's, each once.
        """
        self._optimizer = optimizer
        part_of = {id(p): number for number, part in enumerate(parts) for p in part}
        self._groups: list[list[tuple[int, list[torch.Tensor]]]] = [[] for _ in parts]
        for index, group in enumerate(optimizer.param_groups):
            members: dict[int, list[torch.Tensor]] = {}
            for parameter in group["params"]:
                members.setdefault(part_of[id(parameter)], []).append(parameter)
            for number, groups in enumerate(self._groups):  # all groups, also empty: LAMB may exchange norms of each
                groups.append((index, members.get(number, [])))

    def step(self, part: int) -> None:
        """Update the parameters of one part."""
        whole = self._optimizer.param_groups
        self._optimizer.param_groups = [{**whole[index], "params": mine} for index, mine in self._groups[part]]
        try:
            self._optimizer.step()
        finally:
            self._optimizer.param_groups = whole
