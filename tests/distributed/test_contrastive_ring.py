"""The contrastive loss of several ranks with uneven shares against one of all pairs in fp64."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.distributed as dist
from support.contrastive import OPTIONS, expected, join, make_pairs, relative_error
from support.rank_pool import RankPool

from bert_fast.contrastive.embeddings import Pairs
from bert_fast.contrastive.loss import ContrastiveLoss
from bert_fast.contrastive.options import LossOptions
from bert_fast.errors import UserError

pytestmark = pytest.mark.distributed

Pools = Callable[[int], RankPool]
SHARES = [(41, 5), (30, 0), (53, 17), (28, 9)]  # pairs and further keys of each rank


def pairs_of(world: int, with_ids: bool, width: int = 96) -> list[Pairs]:
    return [make_pairs(*SHARES[rank], width, seed=rank, with_ids=with_ids) for rank in range(world)]


def compute(rank: int, world: int, name: str, scale: float, with_ids: bool, per_node: int | None, gradients: str):
    """This rank's gradients, the loss, and words sent."""
    options = OPTIONS[name]
    options = LossOptions(**{**options.__dict__, "gradients": gradients})
    pairs = pairs_of(world, with_ids)[rank]
    module = ContrastiveLoss(options, scale=scale, learn_scale=True, tile=(32, 48), ranks_per_node=per_node)
    queries, keys = pairs.queries.requires_grad_(), pairs.keys.requires_grad_()
    loss = module(queries, keys, pairs.positives, pairs.query_ids, pairs.key_ids)
    loss.backward()
    assert module.log_scale is not None
    by_scale = module.log_scale.grad.item() / scale
    return loss.item(), queries.grad.numpy(), keys.grad.numpy(), by_scale, module.ring.words_sent


@pytest.mark.parametrize("scale", [20.0, 100.0])
@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize(
    ("world", "per_node", "with_ids", "gradients"),
    [(2, None, False, "mean"), (2, None, True, "sum"), (4, None, True, "mean"), (4, 2, True, "mean")],
)
def test_as_one_rank_with_all_pairs(
    pool: Pools, world: int, per_node: int | None, with_ids: bool, gradients: str, name: str, scale: float
) -> None:
    right = expected(join(pairs_of(world, with_ids)), scale, OPTIONS[name])
    every = pool(world).call(compute, name, scale, with_ids, per_node, gradients)
    times = world if gradients == "mean" else 1
    for loss, *_ in every:
        assert loss == pytest.approx(right.loss, rel=3e-6)
    by_queries = torch.cat([torch.from_numpy(each[1]) for each in every]) / times
    by_keys = torch.cat([torch.from_numpy(each[2]) for each in every]) / times
    assert relative_error(by_queries, right.by_queries) < 3e-6
    assert relative_error(by_keys, right.by_keys) < 3e-6
    # A difference of mean cosines of about 1, which may be small: then of these
    assert sum(each[3] for each in every) / times == pytest.approx(right.by_scale, rel=3e-6, abs=5e-8)


def even(rank: int, world: int) -> float:
    pairs = make_pairs(64, 0, 128, seed=rank)
    module = ContrastiveLoss()
    module(pairs.queries.requires_grad_(), pairs.keys.requires_grad_(), pairs.positives).backward()
    return module.ring.words_sent / (64 * world * 128)


@pytest.mark.parametrize("world", [2, 4])
def test_traffic_is_three_times_the_keys_of_all_ranks(pool: Pools, world: int) -> None:
    """Keys there in forward and in backward, their gradients home: (3 n - 2) blocks; and a few numbers a key."""
    for words in pool(world).call(even):
        assert (3 * world - 2) / world <= words < 3.1


def fail(rank: int, world: int, what: str) -> str:
    pairs = make_pairs(8, 0, 16, seed=rank)
    scale = 20.0
    if what == "nan" and rank == 1:
        pairs.keys[5] = float("nan")
    if what == "scale":
        scale += rank
    if what == "width" and rank == 1:
        pairs = make_pairs(8, 0, 24, seed=rank)
    if what == "few":
        pairs = Pairs(pairs.queries[: 1 - rank], pairs.keys[: 1 - rank])
    try:
        ContrastiveLoss(scale=scale)(pairs.queries, pairs.keys, pairs.positives)
    except UserError as error:
        dist.barrier()  # all ranks can go on
        return str(error)
    return "no error"


@pytest.mark.parametrize(
    ("what", "text"),
    [
        ("nan", "rank 1: the embedding of key 5 is not finite"),
        ("scale", "20, 21"),
        ("width", "rank 1"),
        ("few", "1 pairs"),
    ],
)
def test_what_one_rank_has_wrong_all_ranks_refuse(pool: Pools, what: str, text: str) -> None:
    for message in pool(2).call(fail, what):
        assert text in message
        assert "\n" not in message
