"""Stores of pairs: do they fit the config, and which pairs are in a step?"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from bert_fast.balance.sources import SourceDraw
from bert_fast.config import Config
from bert_fast.config.choices import OBJECTIVES
from bert_fast.data.pairs.store import PairStore
from bert_fast.data.store import Store
from bert_fast.errors import UserError


def check_pairs(store: Store, config: Config) -> None:
    """Refuse a store whose pairs the model or the objective cannot take. Raises UserError."""
    assert isinstance(store, PairStore)
    if store.texts_per_pair != config.texts_per_sample:
        found = store.texts_per_pair - 2
        raise UserError(
            f"store {store.folder} has {found} hard negative(s) for each pair and contrastive.negatives="
            f"{config.contrastive.negatives}; set contrastive.negatives={found} or prepare other pairs"
        )
    if len(store) < 2:
        raise UserError(
            f"store {store.folder} has {len(store)} pair(s); at least 2 are needed, one to tell the other from"
        )


def draw_of(store: Store, config: Config) -> Callable[[int], np.ndarray] | None:
    """Which pairs a step has: of one source, none twice; None: the objective is not about pairs."""
    if not OBJECTIVES[config.train.objective].on_pairs:
        return None
    assert isinstance(store, PairStore)
    sources = [(each.first, each.num_pairs, each.weight) for each in store.sources]
    names = [each.name for each in store.sources]
    return SourceDraw(sources, store.groups, config.batch.global_batch_size, config.train.seed, names=names).draw
