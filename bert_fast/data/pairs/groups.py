"""Which pairs have a text in common, and which are held out: a group is never on both sides."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np

from bert_fast.integers import SPLITMIX64, mix64


def text_key(tokens: Sequence[int]) -> int:
    """A hash of the tokens of a text, 64 bits: equal texts have equal ones, whichever side of a pair they are."""
    digest = hashlib.blake2b(np.array(tokens, dtype="<u2").tobytes(), digest_size=8).digest()
    return int.from_bytes(digest, "little")


def groups_of(keys: np.ndarray) -> np.ndarray:
    """The groups of pairs with a text in common, directly or through others, numbered by their first pair; int64 [N].

    Args:
        keys: uint64 [N, 2], the keys of each pair's query and positive.
    """
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    texts, index = np.unique(keys, return_inverse=True)
    queries, positives = index.reshape(keys.shape).T
    edges = coo_array((np.ones(len(keys), np.int8), (queries, positives)), shape=(len(texts), len(texts)))
    labels = connected_components(edges, directed=False)[1]
    return numbered(labels[queries])


def numbered(groups: np.ndarray) -> np.ndarray:
    """The same groups numbered in the order in which they first occur, int64 [N]."""
    _, first, index = np.unique(groups, return_index=True, return_inverse=True)
    rank = np.empty(len(first), dtype=np.int64)
    rank[np.argsort(first)] = np.arange(len(first))
    return rank[index]


def held_out(groups: np.ndarray, keys: np.ndarray, fraction: float, seed: int) -> np.ndarray:
    """Which pairs are for evaluation, bool [N]: all of a group or none, and at least one group on each side.

    A hash of the group's texts and the seed decides, so that a group stays where it is when others come or go. Where that puts
    all on one side, the smallest group is held out, or the largest is not.

    Args:
        groups: int64 [N], at least two different ones, numbered from 0.
        keys: uint64 [N, 2], as `groups_of` has them.
        fraction: of the groups, above 0 and below 1.
    """
    smallest = np.full(groups.max() + 1, np.iinfo(np.uint64).max, dtype=np.uint64)
    np.minimum.at(smallest, groups, keys.min(axis=1))
    with np.errstate(over="ignore"):
        places = mix64(smallest + mix64(np.array([seed], dtype=np.uint64) + SPLITMIX64[0]))
    is_out = places < np.uint64(int(fraction * 2**64))
    by_size = np.lexsort((places, np.bincount(groups)))
    if not is_out.any():
        is_out[by_size[0]] = True
    if is_out.all():
        is_out[by_size[-1]] = False
    return is_out[groups]
