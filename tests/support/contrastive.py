"""What the contrastive loss must agree with: all scores at once, in fp64, by autograd."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from bert_fast.contrastive.embeddings import Pairs
from bert_fast.contrastive.options import LossOptions


@dataclass
class Expected:
    """fp64: the loss and its gradients by queries, keys and the scale."""

    loss: float
    by_queries: torch.Tensor
    by_keys: torch.Tensor
    by_scale: float


def make_pairs(num: int, extra: int, width: int, seed: int, with_ids: bool = False) -> Pairs:
    """Normalized embeddings, positives anywhere among the keys, two of them equal to their queries, two queries equal."""
    g = torch.Generator().manual_seed(seed)
    queries = F.normalize(torch.randn(num, width, generator=g), dim=1)
    if num > 3:
        queries[2] = queries[3]
    positives = torch.randperm(num + extra, generator=g)[:num]
    keys = F.normalize(torch.randn(num + extra, width, generator=g), dim=1)
    near = queries + 3 * torch.randn(num, width, generator=g) / width**0.5
    keys[positives] = F.normalize(near, dim=1)
    keys[positives[:2]] = queries[:2]
    if not with_ids:
        return Pairs(queries, keys, positives)
    query_ids, key_ids = (torch.randint(0, 40, (n,), generator=g) for n in (num, num + extra))
    key_ids[positives] = query_ids
    return Pairs(queries, keys, positives, query_ids, key_ids)


def join(every: list[Pairs]) -> Pairs:
    """What several ranks have as what one has."""

    def together(tensors: list[torch.Tensor | None]) -> torch.Tensor | None:
        return None if tensors[0] is None else torch.cat([x for x in tensors if x is not None])

    positives, first = [], 0
    for pairs in every:
        assert pairs.positives is not None
        positives.append(pairs.positives + first)
        first += len(pairs.keys)
    return Pairs(
        torch.cat([p.queries for p in every]), torch.cat([p.keys for p in every]), torch.cat(positives),
        together([p.query_ids for p in every]), together([p.key_ids for p in every]),
    )  # fmt: skip


def expected(pairs: Pairs, scale: float, options: LossOptions) -> Expected:
    queries, keys = (x.double().requires_grad_() for x in (pairs.queries, pairs.keys))
    s = torch.tensor(scale, dtype=torch.float64, requires_grad=True)
    total = torch.zeros((), dtype=torch.float64)
    for number, width in enumerate(options.widths or (None,)):
        sides = (queries, keys) if width is None else (F.normalize(x[:, :width], dim=1) for x in (queries, keys))
        total = total + options.weight(number) * _loss(*sides, s, pairs, options)
    total.backward()
    assert queries.grad is not None
    assert keys.grad is not None
    assert s.grad is not None
    return Expected(total.item(), queries.grad, keys.grad, s.grad.item())


def _loss(a: torch.Tensor, b: torch.Tensor, s: torch.Tensor, pairs: Pairs, options: LossOptions) -> torch.Tensor:
    num, positives = len(a), pairs.positives
    assert positives is not None
    pair_keys = b[positives]
    own = s * (a * pair_keys).sum(1)
    limits = (own if options.margin is None else own + options.margin * s).detach()
    itself = torch.eye(num, dtype=torch.bool)
    of_pair_keys = None if pairs.key_ids is None else pairs.key_ids[positives]

    def choices(
        rows: torch.Tensor,
        columns: torch.Tensor,
        ids: tuple[torch.Tensor | None, torch.Tensor | None],
        kept: torch.Tensor,
    ):
        scores = s * rows @ columns.T
        out = torch.zeros_like(kept)
        if ids[0] is not None and ids[1] is not None:
            out |= ids[0][:, None] == ids[1]
        if options.margin is not None:
            out |= scores > limits[:, None]
        return scores.masked_fill(out & ~kept, -torch.inf)

    is_positive = torch.zeros(num, len(b), dtype=torch.bool)
    is_positive[torch.arange(num), positives] = True
    nothing = torch.zeros_like(itself)
    by_query = [choices(a, b, (pairs.query_ids, pairs.key_ids), is_positive)]
    by_key = [choices(pair_keys, a, (of_pair_keys, pairs.query_ids), itself)]
    if options.query_query:
        by_query.append(choices(a, a, (pairs.query_ids, pairs.query_ids), nothing).masked_fill(itself, -torch.inf))
    if options.key_key:
        same = choices(pair_keys, pair_keys, (of_pair_keys, of_pair_keys), nothing).masked_fill(itself, -torch.inf)
        (by_key if options.symmetric else by_query).append(same)
    query_loss = (torch.cat(by_query, 1).logsumexp(1) - own).mean()
    key_loss = (torch.cat(by_key, 1).logsumexp(1) - own).mean()
    return (query_loss + key_loss) / 2 if options.symmetric else query_loss


def relative_error(found: torch.Tensor, right: torch.Tensor) -> float:
    """Norm of the difference over the norm of what is right."""
    return ((found.double() - right).norm() / right.norm()).item()


OPTIONS = {
    "symmetric": LossOptions(),
    "one way": LossOptions(symmetric=False),
    "same side": LossOptions(query_query=True, key_key=True),
    "one way with same side": LossOptions(symmetric=False, query_query=True, key_key=True),
    "margin": LossOptions(margin=0.05, query_query=True, key_key=True),
    "widths": LossOptions(widths=(32, 64, 96)),
    "widths and all": LossOptions(widths=(40, 96), weights=(0.5, 2.0), query_query=True, key_key=True, margin=0.1),
}
