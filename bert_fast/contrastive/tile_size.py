"""Rows and columns of a tile: what is fastest on this machine, measured once for each kind of loss.

Small tiles spend their time in many small matrix products, large ones take memory and leave the caches.
"""

from __future__ import annotations

import functools
import logging
import time
from collections.abc import Callable, Sequence

import torch

from bert_fast.contrastive.softmax import Denominators, Weights
from bert_fast.contrastive.tiles.base import Tiles
from bert_fast.contrastive.vectors import Gradient, Vectors, inverse_lengths

_LOG = logging.getLogger(__name__)
# Two of these (scores and factors) are at most 128 MiB of fp32
_SIZES = {
    "cpu": ((512, 2048), (1024, 4096), (2048, 4096), (4096, 4096)),
    "cuda": ((2048, 4096), (4096, 4096), (8192, 4096)),
}
_SMALL = 4096  # up to so many keys one tile is as good as another
_ROUNDS = 2
_SCALE = 20.0  # any will do
MakeTiles = Callable[[float, bool], Tiles]


def tile_size(
    make: MakeTiles,
    bounded: bool,
    device: torch.device,
    dtype: torch.dtype,
    width: int,
    widths: Sequence[int],
    num_keys: int,
) -> tuple[int, int]:
    """The fastest of some.

    Args:
        make: makes what computes tiles; the same object for the same kind.
        bounded: as `make` takes it.
        width: numbers of an embedding.
        widths: Matryoshka's, which share a tile's memory.
        num_keys: of the rank with most.
    """
    if num_keys <= _SMALL or device.type not in _SIZES:
        return 1024, 4096
    return _fastest(make, bounded, device, dtype, width, tuple(widths), torch.get_num_threads())


@functools.cache
def _fastest(
    make: MakeTiles,
    bounded: bool,
    device: torch.device,
    dtype: torch.dtype,
    width: int,
    widths: tuple[int, ...],
    _num_threads: int,
) -> tuple[int, int]:
    """Cached by what computes tiles, where, and with how many threads."""
    sizes = [(rows // max(1, len(widths)), columns) for rows, columns in _SIZES[device.type]]
    seconds = {
        size: min(_seconds_per_score(make(_SCALE, bounded), size, device, dtype, width, widths) for _ in range(_ROUNDS))
        for size in sizes
    }
    best = min(sizes, key=lambda size: seconds[size])
    measured = ", ".join(f"{r}x{c}: {1e-9 / seconds[(r, c)]:.3f}" for r, c in sizes)
    _LOG.info("contrastive tiles of %d x %d scores (10^9 scores per second, forward and backward: %s)", *best, measured)
    return best


def _seconds_per_score(
    tiles: Tiles, size: tuple[int, int], device: torch.device, dtype: torch.dtype, width: int, widths: tuple[int, ...]
) -> float:
    """Of one tile of random embeddings, forward and backward."""
    generator = torch.Generator(device).manual_seed(0)  # leaves the run's random numbers alone
    sides = []
    for num in size:
        values = torch.randn(num, width, device=device, generator=generator)
        values = torch.nn.functional.normalize(values, dim=1).to(dtype)
        sides.append(Vectors(values, inverse=inverse_lengths(values, widths)))
    rows, columns = sides
    num_losses = max(1, len(widths))
    sums = [[Denominators.empty(num, device) for _ in range(num_losses)] for num in size]
    weights = [
        [Weights(torch.zeros(num, device=device), torch.zeros(num, device=device)) for _ in range(num_losses)]
        for num in size
    ]
    gradients = [Gradient.zeros(side.values, len(widths)) for side in sides]
    _wait(device)
    start = time.perf_counter()
    tiles.forward(rows, columns, sums[0], sums[1], None)
    tiles.backward(rows, columns, weights[0], weights[1], None, *gradients)
    _wait(device)
    return (time.perf_counter() - start) / (size[0] * size[1])


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
