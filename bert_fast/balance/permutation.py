"""A pseudo-random permutation of any size that is computed, not stored: any stretch of it in O(length)."""

from __future__ import annotations

import numpy as np

from bert_fast.integers import mix64

_ROUNDS = 6


class Permutation:
    """A keyed bijection on [0, size): a Feistel network on the next even number of bits, with cycle walking.

    Two keys give unrelated orders; the same key gives the same order on every machine.
    """

    def __init__(self, size: int, key: tuple[int, ...]) -> None:
        self.size = size
        half = max(1, (max(1, size - 1).bit_length() + 1) // 2)
        self._half = np.uint64(half)
        self._mask = np.uint64((1 << half) - 1)
        words = np.random.SeedSequence(key).generate_state(_ROUNDS, np.uint64)
        self._keys = [np.uint64(word) for word in words]

    def __call__(self, positions: np.ndarray) -> np.ndarray:
        """Images of `positions` (int64, each in [0, size)), int64."""
        values = self._feistel(positions.astype(np.uint64))
        outside = values >= self.size
        while outside.any():  # fewer than 4 walks on average: the domain is at most 4 times the size
            values[outside] = self._feistel(values[outside])
            outside = values >= self.size
        return values.astype(np.int64)

    def _feistel(self, values: np.ndarray) -> np.ndarray:
        left, right = values >> self._half, values & self._mask
        for key in self._keys:
            left, right = right, left ^ (mix64(right + key) & self._mask)
        return (left << self._half) | right


class EpochOrder:
    """An endless order over `size` items: epoch after epoch without replacement, each in its own random order."""

    def __init__(self, size: int, key: tuple[int, ...]) -> None:
        self._size, self._key = size, key
        self._epochs: dict[int, Permutation] = {}

    def take(self, start: int, count: int) -> np.ndarray:
        """Items at places start ... start + count - 1 of the endless order, int64; epochs flow into each other."""
        pieces = []
        while count > 0:
            epoch, place = divmod(start, self._size)
            here = min(count, self._size - place)
            if epoch not in self._epochs:
                self._epochs = {epoch: Permutation(self._size, (*self._key, epoch))}
            pieces.append(self._epochs[epoch](np.arange(place, place + here)))
            start, count = start + here, count - here
        return np.concatenate(pieces)
