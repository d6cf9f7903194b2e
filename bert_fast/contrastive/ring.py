"""Blocks of every rank visit all ranks, one hop at a time; what is added up for a block travels with it and comes home.

No rank holds more than a few blocks, and a transfer runs while tiles are computed. In one ring a block goes to the next rank;
with `ranks_per_node` it visits the ranks of a node first and then goes to the next node, for which there is time until
all ranks of the node are visited, and all ranks of a node use their links at once (a ring over nodes uses one rank's).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist

from bert_fast.errors import UserError

# Which block is here, by the rank it belongs to, and its constant tensors; returns what is to be added to its sums
Visit = Callable[[int, Sequence[torch.Tensor]], list[torch.Tensor]]
# Adds what a visit returned to sums that have arrived, in place
Merge = Callable[[Sequence[torch.Tensor], Sequence[torch.Tensor]], None]


@dataclass(frozen=True)
class Shape:
    """Of a tensor of each block, of which the first dimension differs from rank to rank."""

    rest: tuple[int, ...]
    dtype: torch.dtype


class Route:
    """Who has whose block at which step, for one rank.

    Args:
        rank, world: in the group.
        ranks_per_node: of consecutive ranks; None, 1 or `world`: one ring.

    Raises:
        UserError: the ranks do not fill their nodes.
    """

    def __init__(self, rank: int, world: int, ranks_per_node: int | None = None) -> None:
        per_node = ranks_per_node or world
        if per_node < 1 or world % per_node:
            raise UserError(
                f"contrastive ranks_per_node={ranks_per_node} does not divide the {world} ranks of the group"
            )
        self.rank, self.num_steps = rank, world
        self._per_node, self._num_nodes = per_node, world // per_node
        self._node, self._local = divmod(rank, per_node)

    def owner(self, step: int) -> int:
        """The rank whose block is here."""
        return self._owner(self._node, self._local, step)

    def _owner(self, node: int, local: int, step: int) -> int:
        outer, inner = divmod(step, self._per_node)
        return (node - outer) % self._num_nodes * self._per_node + (local - inner) % self._per_node

    def holder(self, owner: int, step: int) -> int:
        """The rank where a block is."""
        outer, inner = divmod(step, self._per_node)
        node, local = divmod(owner, self._per_node)
        return (node + outer) % self._num_nodes * self._per_node + (local + inner) % self._per_node

    def departures(self, step: int) -> list[int]:
        """The steps for which blocks leave at the start of this one: the next, and the first one on the next node.

        A block for the next node leaves at the start of the first step on this one, so that it has all of them to arrive.
        """
        outer, inner = divmod(step, self._per_node)
        steps = [step + 1] if inner + 1 < self._per_node else []
        return [*steps, step + self._per_node] if inner == 0 and outer + 1 < self._num_nodes else steps


class Ring:
    """Sends blocks along a route.

    rank, world: in the group
    words_sent:  numbers of 4 bytes that this rank has sent

    Args:
        group: None: the default one, or a single process where there is none.
    """

    def __init__(self, group: dist.ProcessGroup | None = None, ranks_per_node: int | None = None) -> None:
        alone = not dist.is_initialized()
        self.group = group
        self.rank, self.world = (0, 1) if alone else (dist.get_rank(group), dist.get_world_size(group))
        self.route = Route(self.rank, self.world, ranks_per_node)
        self.words_sent = 0.0

    def circulate(
        self,
        constants: Sequence[torch.Tensor],
        sums: Sequence[Shape],
        num_rows: Sequence[int],
        visit: Visit,
        merge: Merge,
    ) -> list[torch.Tensor]:
        """Every block is visited by every rank. A collective.

        Args:
            constants: of this rank's block; first dimension `num_rows[rank]`.
            sums: the tensors that `visit` returns.
            num_rows: of the block of every rank.

        Returns:
            All that was added up for this rank's block.
        """
        route, device = self.route, constants[0].device
        blocks = {0: list(constants)}
        moving: dict[int, _Transfer] = {}  # by the step for which they arrive
        sums_moving: _Transfer | None = None
        held: list[torch.Tensor] = []  # sums of the block that is here
        for step in range(route.num_steps):
            if step in moving:
                moving.pop(step).wait()
            block, owner = blocks.pop(step), route.owner(step)
            for later in route.departures(step):
                coming = route.owner(later)
                blocks[later] = [
                    torch.empty((num_rows[coming], *x.shape[1:]), dtype=x.dtype, device=device) for x in constants
                ]
                moving[later] = self._transfer(
                    block, route.holder(owner, later), blocks[later], route.holder(coming, step)
                )
            added = visit(owner, block)
            if sums_moving is None:
                held = added
            else:
                sums_moving.wait()
                merge(held, added)
            if route.num_steps == 1:
                break
            last = step + 1 == route.num_steps
            coming = self.rank if last else route.owner(step + 1)
            arriving = [torch.empty((num_rows[coming], *s.rest), dtype=s.dtype, device=device) for s in sums]
            destination = owner if last else route.holder(owner, step + 1)
            sums_moving = self._transfer(held, destination, arriving, route.holder(coming, step))
            held = arriving
        if sums_moving is not None:
            sums_moving.wait()
        return held

    def _transfer(
        self, sent: Sequence[torch.Tensor], to: int, received: Sequence[torch.Tensor], source: int
    ) -> _Transfer:
        """Begin to send and to receive, all of one moment together, as NCCL wants them."""
        sent, received = [x for x in sent if x.numel()], [x for x in received if x.numel()]
        self.words_sent += sum(tensor.numel() * tensor.element_size() / 4 for tensor in sent)
        operations = [dist.P2POp(dist.isend, tensor, group=self.group, group_peer=to) for tensor in sent]
        operations += [dist.P2POp(dist.irecv, tensor, group=self.group, group_peer=source) for tensor in received]
        return _Transfer(dist.batch_isend_irecv(operations) if operations else [], sent)


class _Transfer:
    """Transfers that have begun, and the memory they read."""

    def __init__(self, works: list[dist.Work], sent: Sequence[torch.Tensor]) -> None:
        self._works, self._sent = works, sent

    def wait(self) -> None:
        for work in self._works:
            work.wait()
        self._works, self._sent = [], []
