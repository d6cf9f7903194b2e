"""Where blocks are on their way: every rank is visited once, and what is sent is what is waited for."""

from __future__ import annotations

import pytest

from bert_fast.contrastive.ring import Route
from bert_fast.errors import UserError

RINGS = [(1, None), (2, None), (5, None), (4, 2), (6, 2), (6, 3), (8, 8), (8, 1), (12, 4)]


@pytest.mark.parametrize(("world", "per_node"), RINGS)
def test_every_block_visits_every_rank_and_starts_at_home(world: int, per_node: int | None) -> None:
    routes = [Route(rank, world, per_node) for rank in range(world)]
    for step in range(world):
        owners = [route.owner(step) for route in routes]
        assert sorted(owners) == list(range(world))
        for rank, owner in enumerate(owners):
            assert routes[rank].holder(owner, step) == rank
    for rank, route in enumerate(routes):
        assert route.owner(0) == rank
        assert sorted(route.owner(step) for step in range(world)) == list(range(world))


@pytest.mark.parametrize(("world", "per_node"), RINGS)
def test_every_block_leaves_once_for_every_step(world: int, per_node: int | None) -> None:
    route = Route(0, world, per_node)
    arrivals = [later for step in range(world) for later in route.departures(step)]
    assert sorted(arrivals) == list(range(1, world))


def test_a_block_for_the_next_node_has_all_steps_of_this_one_to_arrive() -> None:
    route = Route(0, 8, 4)
    assert route.departures(0) == [1, 4]
    nodes = [route.holder(0, step) // 4 for step in range(8)]
    assert nodes == [0] * 4 + [1] * 4


def test_ranks_that_do_not_fill_their_nodes() -> None:
    with pytest.raises(UserError, match="ranks_per_node=4 does not divide the 6 ranks"):
        Route(0, 6, 4)
