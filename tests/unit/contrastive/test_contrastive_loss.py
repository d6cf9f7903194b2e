"""The contrastive loss tile by tile against all scores in fp64."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from support.contrastive import OPTIONS, expected, make_pairs, relative_error

from bert_fast.contrastive.embeddings import Pairs
from bert_fast.contrastive.loss import ContrastiveLoss
from bert_fast.contrastive.options import LossOptions
from bert_fast.errors import UserError


def run(pairs: Pairs, scale: float, options: LossOptions, tile: tuple[int, int] | None = (32, 48)):
    """The loss and its gradients by queries, keys and the scale."""
    module = ContrastiveLoss(options, scale=scale, learn_scale=True, tile=tile)
    queries, keys = (x.clone().requires_grad_() for x in (pairs.queries, pairs.keys))
    loss = module(queries, keys, pairs.positives, pairs.query_ids, pairs.key_ids)
    loss.backward()
    assert module.log_scale is not None
    return loss.item(), queries.grad, keys.grad, module.log_scale.grad.item() / scale


@pytest.mark.parametrize("with_ids", [False, True])
@pytest.mark.parametrize("scale", [20.0, 100.0])
@pytest.mark.parametrize("width", [96, 770])
@pytest.mark.parametrize("name", OPTIONS)
def test_loss_and_gradients(name: str, width: int, scale: float, with_ids: bool) -> None:
    """101 pairs and 37 further keys in tiles of 32 x 48, two pairs of equal embeddings."""
    pairs = make_pairs(101, 37, width, seed=0, with_ids=with_ids)
    right = expected(pairs, scale, OPTIONS[name])
    loss, by_queries, by_keys, by_scale = run(pairs, scale, OPTIONS[name])
    assert loss == pytest.approx(right.loss, rel=3e-6)
    assert relative_error(by_queries, right.by_queries) < 3e-6
    assert relative_error(by_keys, right.by_keys) < 3e-6
    assert by_scale == pytest.approx(right.by_scale, rel=3e-6)


@pytest.mark.parametrize("scale", [20.0, 100.0])
@pytest.mark.parametrize("width", [96, 770])
def test_bf16_operands_are_the_only_thing_that_is_rounded(width: int, scale: float) -> None:
    pairs = make_pairs(101, 37, width, seed=1)
    rounded = replace(pairs, queries=pairs.queries.bfloat16().float(), keys=pairs.keys.bfloat16().float())
    right = expected(rounded, scale, LossOptions())
    _, by_queries, by_keys, _ = run(pairs, scale, LossOptions(precision="bf16"))
    assert relative_error(by_queries, right.by_queries) < 3e-6
    assert relative_error(by_keys, right.by_keys) < 3e-6


@pytest.mark.parametrize(("scale", "width"), [(20.0, 96), (20.0, 770), (50.0, 96), (100.0, 770)])
def test_bf16_is_near_the_loss_of_whole_embeddings(width: int, scale: float) -> None:
    pairs = make_pairs(101, 37, width, seed=1)
    right = expected(pairs, scale, LossOptions())
    _, by_queries, by_keys, _ = run(pairs, scale, LossOptions(precision="bf16"))
    assert relative_error(by_queries, right.by_queries) < 6e-3
    assert relative_error(by_keys, right.by_keys) < 6e-3


@pytest.mark.parametrize("layout", ["PNNPNN", "PPNN"])
def test_hard_negatives_wherever_they_lie(layout: str) -> None:
    """The same keys in another order are the same loss."""
    pairs = make_pairs(6, 0, 32, seed=2)
    assert pairs.positives is not None
    own = pairs.keys[pairs.positives]
    negatives = F.normalize(torch.randn(12, 32, generator=torch.Generator().manual_seed(0)), dim=1)
    if layout == "PPNN":
        keys, positives = torch.cat([own, negatives]), torch.arange(6)
    else:
        keys, positives = torch.cat([own[:, None], negatives.view(6, 2, 32)], 1).flatten(0, 1), torch.arange(0, 18, 3)
    found = run(Pairs(pairs.queries, keys, positives), 20.0, LossOptions())
    right = expected(Pairs(pairs.queries, torch.cat([own, negatives]), torch.arange(6)), 20.0, LossOptions())
    assert found[0] == pytest.approx(right.loss, rel=1e-6)
    assert relative_error(found[1], right.by_queries) < 3e-6
    assert relative_error(found[2][positives], right.by_keys[:6]) < 3e-6


def test_a_loss_of_nearly_nothing_keeps_its_digits() -> None:
    """Equal embeddings at scale 100: probabilities are 1 in fp32, gradients of 1e-30 are not 0 and not noise."""
    g = torch.Generator().manual_seed(0)
    queries = F.normalize(torch.randn(20, 96, generator=g), dim=1)
    pairs = Pairs(queries, queries.clone(), torch.arange(20))
    right = expected_of_difference(pairs, 100.0)
    loss, by_queries, _, _ = run(pairs, 100.0, LossOptions())
    assert 0 < loss < 1e-20
    assert relative_error(by_queries, right) < 1e-4


def expected_of_difference(pairs: Pairs, scale: float) -> torch.Tensor:
    """Gradient by queries in fp64 where 1 - p would have no digits in fp64 either: from the others' probabilities."""
    queries, keys = pairs.queries.double(), pairs.keys.double()
    scores = scale * queries @ keys.T
    others = (scores - scores.diagonal()[:, None]).exp().fill_diagonal_(0)
    rows = others / (1 + others.sum(1, keepdim=True))
    columns = (scores - scores.diagonal()).exp().fill_diagonal_(0)
    columns = columns / (1 + columns.sum(0))
    gradient = (rows - torch.diag(rows.sum(1)) + columns - torch.diag(columns.sum(0))) / (2 * len(queries))
    return scale * gradient @ keys


@pytest.mark.parametrize("tile", [(3, 5), (7, 200), (200, 7), (101, 138), (1000, 1000)])
def test_every_tile_is_the_same_loss(tile: tuple[int, int]) -> None:
    pairs = make_pairs(101, 37, 32, seed=3)
    right = expected(pairs, 50.0, LossOptions())
    loss, by_queries, by_keys, _ = run(pairs, 50.0, LossOptions(), tile)
    assert loss == pytest.approx(right.loss, rel=3e-6)
    assert relative_error(by_queries, right.by_queries) < 3e-6
    assert relative_error(by_keys, right.by_keys) < 3e-6


def test_embeddings_that_are_not_normalized() -> None:
    """Lengths of up to 30, so that scores are far above what has an exponential in fp32."""
    pairs = make_pairs(50, 10, 32, seed=4)
    lengths = torch.linspace(0.1, 30, 60)
    pairs = replace(pairs, queries=pairs.queries * lengths[:50, None], keys=pairs.keys * lengths[:, None])
    right = expected(pairs, 1.0, LossOptions())
    loss, by_queries, by_keys, by_scale = run(pairs, 1.0, LossOptions())
    assert loss == pytest.approx(right.loss, rel=1e-5)
    assert relative_error(by_queries, right.by_queries) < 2e-5
    assert relative_error(by_keys, right.by_keys) < 2e-5
    assert by_scale == pytest.approx(right.by_scale, rel=2e-5)


def test_a_learned_scale_stays_below_its_bound_and_can_come_back() -> None:
    pairs = make_pairs(20, 0, 16, seed=5)
    module = ContrastiveLoss(scale=100.0, learn_scale=True)
    assert module.log_scale is not None
    with torch.no_grad():
        module.log_scale.add_(1.0)
    module(pairs.queries.requires_grad_(), pairs.keys, pairs.positives).backward()
    assert module.scale.item() == pytest.approx(100.0)
    assert module.log_scale.grad.item() != 0


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"margin": -1.0}, "margin"), ({"margin": float("nan")}, "margin"), ({"widths": (8, 4)}, "widths"),
        ({"widths": (4,), "weights": (1.0, 2.0)}, "weights"), ({"widths": (4,), "weights": (0.0,)}, "weights"),
        ({"precision": "fp8"}, "precision"), ({"gradients": "max"}, "gradients"),
    ],
)  # fmt: skip
def test_options_that_cannot_be(options: dict, text: str) -> None:
    with pytest.raises(UserError, match=text):
        LossOptions(**options)


@pytest.mark.parametrize("scale", [0.0, -1.0, float("inf"), float("nan")])
def test_a_scale_that_is_none(scale: float) -> None:
    with pytest.raises(UserError, match="scale"):
        ContrastiveLoss(scale=scale)


def test_embeddings_that_cannot_be_compared() -> None:
    good = F.normalize(torch.randn(4, 8, generator=torch.Generator().manual_seed(0)), dim=1)
    broken = good.clone()
    broken[2, 3] = float("nan")
    ids = torch.zeros(4, dtype=torch.int64)
    loss = ContrastiveLoss()
    for arguments, text in (
        ((good[:1], good[:1]), "at least 2"), ((good[:0], good[:0]), "at least 2"),
        ((broken, good), "rank 0: the embedding of query 2 is not finite"),
        ((good, broken), "rank 0: the embedding of key 2 is not finite"), ((good, good[:, :4]), "one width"),
        ((good, good[:3]), "positives"), ((good, good, torch.tensor([0, 1, 2, 2])), "positives"),
        ((good, good, torch.tensor([0, 1, 2, 4])), "positives"), ((good, good, None, ids, ids), "same id"),
    ):  # fmt: skip
        with pytest.raises(UserError, match=text) as raised:
            loss(*arguments)
        assert "\n" not in str(raised.value)
    with pytest.raises(UserError, match="widths"):
        ContrastiveLoss(LossOptions(widths=(4, 16)))(good, good)
