"""The embeddings of all ranks: what each has, checked on all of them alike."""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass

import torch
import torch.distributed as dist

from bert_fast.contrastive.options import LossOptions, check_scale
from bert_fast.contrastive.ring import Ring
from bert_fast.errors import UserError


@dataclass(frozen=True)
class Pairs:
    """Embeddings of this rank. Every rank has its own, as many as it likes.

    queries:   [b, d]
    keys:      [k, d], with each query's positive, further keys being negatives of all queries of all ranks
    positives: int64 [b], which key is each query's positive; no two have the same one. None: key i is that of query i
    query_ids, key_ids: int64 [b], [k]: a query and a key of the same id are no negatives of each other, nor are two queries or
               two keys; a positive has its query's id. None: no two are the same
    """

    queries: torch.Tensor
    keys: torch.Tensor
    positives: torch.Tensor | None = None
    query_ids: torch.Tensor | None = None
    key_ids: torch.Tensor | None = None


@dataclass(frozen=True)
class Shares:
    """What all ranks know of the embeddings of all.

    num_queries, num_keys: of each rank
    longest: length of the longest embedding
    """

    num_queries: list[int]
    num_keys: list[int]
    longest: float
    scale: float


def share(pairs: Pairs, scale: float, options: LossOptions, ring: Ring) -> Shares:
    """Tell all ranks what each has, and refuse what cannot be computed, on every rank alike. A collective."""
    queries, keys = pairs.queries, pairs.keys
    lengths = [_lengths(values) for values in (queries, keys)]
    bad = [_first(~torch.isfinite(length)) for length in lengths]
    longest = max([float(length.max()) for length in lengths if len(length)], default=0.0)
    positives = pairs.positives
    wrong = 0.0 if positives is None else float(_wrong_positives(positives, len(queries), len(keys)))
    if positives is None and len(keys) < len(queries):
        wrong = 1.0
    width = queries.shape[1] if queries.ndim == 2 and keys.ndim == 2 and keys.shape[1] == queries.shape[1] else -1
    identity = int(hashlib.sha256(repr(options).encode()).hexdigest()[:12], 16)
    ids = pairs.query_ids
    ends = [math.inf, -math.inf] if ids is None or not len(ids) else [float(ids.min()), float(ids.max())]
    mine = torch.tensor(
        [len(queries), len(keys), *bad, longest, wrong, width, scale, identity, *ends],
        dtype=torch.float64,
        device=queries.device,
    )
    every = [torch.empty_like(mine) for _ in range(ring.world)]
    if ring.world > 1:
        dist.all_gather(every, mine, group=ring.group)
    else:
        every = [mine]
    table = torch.stack(every).tolist()
    for rank, (_, _, bad_query, bad_key, _, wrong, width, *_) in enumerate(table):
        where = f"contrastive loss, rank {rank}"
        if width != table[0][6] or width < 1:
            raise UserError(
                f"{where}: queries and keys are matrices of one width, {'' if width < 1 else f'{table[0][6]:.0f} on rank 0, '}"
                f"here {tuple(queries.shape)} and {tuple(keys.shape)} on rank {ring.rank}"
            )
        if wrong:
            raise UserError(
                f"{where}: positives must name another key of this rank for each query"
                + (f" ({len(queries)} queries, {len(keys)} keys)" if rank == ring.rank else "")
            )
        for what, number in (("query", bad_query), ("key", bad_key)):
            if number >= 0:
                raise UserError(
                    f"{where}: the embedding of {what} {number:.0f} is not finite; lower the learning rate or look at it"
                )
    if len({row[7] for row in table}) > 1 or len({row[8] for row in table}) > 1:
        scales = ", ".join(f"{scale:g}" for scale in sorted({row[7] for row in table}))
        raise UserError(
            f"contrastive loss: ranks have different options or scales ({scales}); give all of them the same"
        )
    check_scale(scale)
    if options.widths and options.widths[-1] > table[0][6]:
        raise UserError(f"contrastive widths {list(options.widths)}: embeddings have {table[0][6]:.0f} numbers")
    num_queries, num_keys = [int(row[0]) for row in table], [int(row[1]) for row in table]
    if sum(num_queries) < 2:
        raise UserError(
            f"contrastive loss of {sum(num_queries)} pairs: at least 2, as the others are a pair's negatives"
        )
    if min(row[9] for row in table) == max(row[10] for row in table):
        raise UserError(
            "contrastive loss: all pairs have the same id, so that none has a negative; is it one query repeated?"
        )
    return Shares(num_queries, num_keys, max(row[4] for row in table), scale)


def _lengths(values: torch.Tensor) -> torch.Tensor:
    if values.ndim != 2:
        return values.new_zeros(0)
    return torch.linalg.vector_norm(values.detach(), dim=1, dtype=torch.float32)


def _first(flags: torch.Tensor) -> float:
    """The first that is set, -1 if none is."""
    found = flags.nonzero()
    return float(found[0]) if len(found) else -1.0


def _wrong_positives(positives: torch.Tensor, num_queries: int, num_keys: int) -> bool:
    if positives.shape != (num_queries,):
        return True
    if not num_queries:
        return False
    outside = positives.min() < 0 or positives.max() >= num_keys
    return bool(outside) or len(positives.unique()) != num_queries
