"""The paper's draw (arXiv 2402.02447): in every step each rank takes a fixed count from each stratum of lengths."""

from __future__ import annotations

import numpy as np

from bert_fast.balance.permutation import EpochOrder
from bert_fast.errors import UserError

_BLOCK = 64  # samples whose strata are counted together: half a byte of index per sample and stratum
_CHUNK = _BLOCK * 2**16  # samples looked at at once


class Strata:
    """Draws from length strata without listing their members: 160 million samples take about 10 MB per stratum.

    Within a stratum the order is random without replacement, epoch after epoch. A stratum with a larger count than its
    share is through sooner: its samples are seen more often (the counts of the default follow the true shares).
    """

    def __init__(
        self,
        lengths: np.ndarray,
        bounds: np.ndarray,
        counts: np.ndarray | None,
        per_rank: int,
        world_size: int,
        seed: int,
    ) -> None:
        """
        Args:
            lengths: uint16 [N], may be memory-mapped; read once, in chunks.
            bounds: upper length bounds of the strata, ascending, the last at least the longest length.
            counts: samples a rank takes of each stratum; largest remainders of the true shares if None.

        Raises:
            UserError: a stratum has fewer samples than a step takes of it.
        """
        self._lengths, self._world = lengths, world_size
        self._bounds, self._lows = bounds, np.concatenate([[0], bounds[:-1]])
        rest = len(lengths) % _BLOCK
        self._tail = np.zeros(_BLOCK, np.uint16)  # the last block, filled up with a length that is in no stratum
        self._tail[:rest] = lengths[len(lengths) - rest :]
        self._starts = self._count()
        sizes = self._starts[:, -1].astype(np.int64)
        self.counts = largest_remainder(sizes / sizes.sum(), per_rank) if counts is None else counts
        for stratum, (size, count) in enumerate(zip(sizes, self.counts, strict=True)):
            if size < count * world_size:
                raise UserError(
                    f"balance.strategy=stratified_presort: stratum {stratum} of {len(bounds)} (up to {bounds[stratum]} "
                    f"tokens) has {size} samples and a step takes {count * world_size} of them; use fewer strata or a "
                    "smaller batch"
                )
        self._orders = [
            EpochOrder(int(size), (seed, 2, stratum)) if count else None
            for stratum, (size, count) in enumerate(zip(sizes, self.counts, strict=True))
        ]

    def draw(self, step: int) -> np.ndarray:
        """Sample ids of a step, rank by rank, int64."""
        columns = []
        for stratum, (order, count) in enumerate(zip(self._orders, self.counts, strict=True)):
            if order is not None:
                number = int(count) * self._world
                places = order.take(step * number, number)
                columns.append(self._members(stratum, places).reshape(self._world, -1))
        return np.concatenate(columns, axis=1).reshape(-1)

    def _count(self) -> np.ndarray:
        """Members of each stratum before each block, [strata, blocks + 1]."""
        num_whole = len(self._lengths) // _BLOCK
        counts = np.zeros((len(self._bounds), num_whole + 2), np.uint32 if len(self._lengths) < 2**32 else np.int64)
        chunks = [(start, self._lengths[start : start + _CHUNK]) for start in range(0, num_whole * _BLOCK, _CHUNK)]
        for start, lengths in [*chunks, (num_whole * _BLOCK, self._tail)]:
            blocks = lengths[: len(lengths) // _BLOCK * _BLOCK].reshape(-1, _BLOCK)
            first = start // _BLOCK + 1
            for stratum, (low, high) in enumerate(zip(self._lows, self._bounds, strict=True)):
                is_member = (blocks > low) & (blocks <= high)
                counts[stratum, first : first + len(blocks)] = is_member.sum(axis=1, dtype=np.uint8)
        for row in counts:
            np.cumsum(row, out=row)
        return counts

    def _members(self, stratum: int, places: np.ndarray) -> np.ndarray:
        """Ids of the members number `places` of a stratum, int64."""
        starts = self._starts[stratum]
        block = np.searchsorted(starts, places.astype(starts.dtype), side="right") - 1
        whole = self._lengths[: len(self._lengths) // _BLOCK * _BLOCK].reshape(-1, _BLOCK)
        in_tail = block == len(whole)
        lengths = np.empty((len(places), _BLOCK), np.uint16)
        lengths[~in_tail] = whole[block[~in_tail]]
        lengths[in_tail] = self._tail
        is_member = (lengths > self._lows[stratum]) & (lengths <= self._bounds[stratum])
        return block * _BLOCK + _nth_set(is_member, places - starts[block])


def _nth_set(flags: np.ndarray, nth: np.ndarray) -> np.ndarray:
    """Column of the set flag number `nth` (from 0) of every row; flags: bool [n, 8 k], each row with enough set."""
    packed = np.packbits(flags, axis=1, bitorder="little")
    running = np.cumsum(np.bitwise_count(packed), axis=1, dtype=np.int64)
    byte = (running <= nth[:, None]).sum(axis=1)
    rows = np.arange(len(flags))
    here = packed[rows, byte]
    return 8 * byte + _NTH_BIT[here, nth - (running[rows, byte] - np.bitwise_count(here))]


def _nth_bits() -> np.ndarray:
    """[256, 8]: place of the set bit number k of a byte."""
    bits = (np.arange(256)[:, None] >> np.arange(8)) & 1
    return np.argsort(1 - bits, axis=1, kind="stable").astype(np.int64)


_NTH_BIT = _nth_bits()


def largest_remainder(shares: np.ndarray, total: int) -> np.ndarray:
    """Whole numbers that add up to `total`, as near to `shares` (which add up to 1) as largest remainders bring them."""
    exact = shares * total
    counts = np.floor(exact).astype(np.int64)
    missing = total - int(counts.sum())
    counts[np.argsort(-(exact - counts), kind="stable")[:missing]] += 1
    return counts
