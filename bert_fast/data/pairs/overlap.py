"""Do a training and an evaluation store of pairs share queries?"""

from __future__ import annotations

import numpy as np

from bert_fast.data.overlap import Shared
from bert_fast.data.pairs.store import PairStore

_MOST = 2_000_000  # pairs of the training store that are looked at, spread evenly


def shared_queries(train: PairStore, evaluation: PairStore, num_samples: int | None) -> Shared:
    """How many of the first `num_samples` evaluation pairs (None: all) have a query that the training store has as well."""
    compared = min(len(evaluation), num_samples or len(evaluation))
    wanted = [_query(evaluation, index) for index in range(compared)]
    known = set(wanted)
    looked_at = np.unique(np.linspace(0, len(train) - 1, min(len(train), _MOST)).astype(np.int64))
    found = {query for index in looked_at.tolist() if (query := _query(train, index)) in known}
    return Shared(sum(query in found for query in wanted), compared, len(looked_at) / len(train))


def _query(store: PairStore, index: int) -> bytes:
    sample = store[index]
    return sample.input_ids[: sample.len_a].tobytes()
