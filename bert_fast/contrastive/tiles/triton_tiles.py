"""Tiles on CUDA by kernels in Triton: forward reads embeddings and writes sums, and never a score.

Torch's own operations write the scores of a tile to memory and read them again for every step of their softmaxes. Here a
program has its block of scores in registers. Backward computes them once more, writes the gradient by each, and leaves the two
matrix products with that to cuBLAS.
"""

from __future__ import annotations

import functools
import logging
import math
import time
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import NamedTuple

import torch

from bert_fast.contrastive.softmax import Denominators, Weights
from bert_fast.contrastive.tiles.base import Buffers, add_product
from bert_fast.contrastive.vectors import Gradient, Vectors
from bert_fast.errors import UserError

_LOG = logging.getLogger(__name__)
_ALIGNED = 16  # numbers: rows of the gradient start at whole multiples of 16 bytes, which cuBLAS is fastest with
_ROUNDS = 3
_SIZE = 4096  # rows and columns of a tile that configurations are timed with
_SCALE = 20.0  # any will do


class Blocks(NamedTuple):
    """How a kernel divides its work: scores [m, n] and k numbers of the embeddings at a time for a program."""

    m: int
    n: int
    k: int
    num_warps: int
    num_stages: int

    def __str__(self) -> str:
        return f"{self.m}x{self.n}x{self.k} in {self.num_warps} warps, {self.num_stages} stages"


# What is tried on a device. bf16 has tensor cores; fp32 has not, as their operands have 10 bits of fraction
_CHOICES = {
    torch.bfloat16: (
        Blocks(128, 256, 64, 8, 3),
        Blocks(128, 128, 64, 8, 3),
        Blocks(128, 128, 64, 4, 4),
        Blocks(128, 128, 32, 4, 4),
        Blocks(64, 64, 32, 4, 2),
    ),
    torch.float32: (
        Blocks(128, 128, 16, 8, 3),
        Blocks(128, 64, 16, 8, 3),
        Blocks(64, 64, 32, 4, 3),
        Blocks(64, 64, 16, 4, 3),
    ),
}
_INTERPRETED = Blocks(32, 32, 512, 1, 1)


class TritonTiles:
    """The scores of the vectors as they are. Arguments as `TorchTiles` has them.

    The sums of forward do not depend on the order in which programs run, but their last bits depend on the blocks, which are
    chosen by their speed, once in a process.

    Raises:
        UserError: the package triton is not installed.
    """

    def __init__(self, scale: float, bounded: bool) -> None:
        self._scale, self._bounded = scale, bounded
        self._kernels = _kernels()
        self._buffer = Buffers()

    def forward(
        self,
        rows: Vectors,
        columns: Vectors,
        of_rows: Sequence[Denominators],
        of_columns: Sequence[Denominators] | None,
        positives: torch.Tensor | None,
    ) -> None:
        blocks = _blocks("forward", self._bounded, rows.values)
        self._add_exponentials(rows, columns, of_rows[0], of_columns[0] if of_columns else None, positives, blocks)

    def backward(
        self,
        rows: Vectors,
        columns: Vectors,
        of_rows: Sequence[Weights],
        of_columns: Sequence[Weights] | None,
        positives: torch.Tensor | None,
        by_rows: Gradient,
        by_columns: Gradient,
    ) -> None:
        blocks = _blocks("backward", self._bounded, rows.values)
        gradient = self._gradient(rows, columns, of_rows[0], of_columns[0] if of_columns else None, positives, blocks)
        add_product(by_rows.values, gradient, columns.values)
        add_product(by_columns.values, gradient.t(), rows.values)

    def _add_exponentials(
        self,
        rows: Vectors,
        columns: Vectors,
        of_rows: Denominators,
        of_columns: Denominators | None,
        positives: torch.Tensor | None,
        blocks: Blocks,
    ) -> None:
        """`forward` with certain blocks."""
        r, c, device = len(rows), len(columns), rows.values.device
        row_blocks, column_blocks = math.ceil(r / blocks.m), math.ceil(c / blocks.n)
        row_parts = self._parts("row", column_blocks, r, device)
        column_parts = None if of_columns is None else self._parts("column", row_blocks, c, device)
        with torch.cuda.device_of(rows.values):
            self._kernels.add_exponentials[row_blocks * column_blocks,](
                *_operands(rows, columns, positives), *row_parts, *(column_parts or (None, None)),
                *self._sizes(rows, columns), BOUNDED=self._bounded, **_launch(blocks),
            )  # fmt: skip
        of_rows.add(self._together(*row_parts))
        if of_columns is not None and column_parts is not None:
            of_columns.add(self._together(*column_parts))

    def _parts(self, side: str, num_blocks: int, num: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        """Memory for the maxima and the sums of all blocks, fp32 [blocks, num] each."""
        maxima = self._buffer(f"{side} maxima", num_blocks, num, device)
        return maxima, self._buffer(f"{side} totals", num_blocks, num, device)

    def _gradient(
        self,
        rows: Vectors,
        columns: Vectors,
        of_rows: Weights,
        of_columns: Weights | None,
        positives: torch.Tensor | None,
        blocks: Blocks,
    ) -> torch.Tensor:
        """By each score, in the dtype of the embeddings [r, c]; overwritten by the next one."""
        r, c, values = len(rows), len(columns), rows.values
        stride = math.ceil(c / _ALIGNED) * _ALIGNED
        dtype = torch.float32 if self._kernels.INTERPRETED else values.dtype  # the interpreter cuts bits off for bf16
        gradient = self._buffer("gradient", r, stride, values.device, dtype)[:, :c]
        weights = [*of_rows, *(of_columns or (None, None))]
        with torch.cuda.device_of(values):
            self._kernels.write_gradient[math.ceil(r / blocks.m) * math.ceil(c / blocks.n),](
                *_operands(rows, columns, positives), *map(_in_a_row, weights), gradient,
                *self._sizes(rows, columns), stride, BOUNDED=self._bounded, **_launch(blocks),
            )  # fmt: skip
        return gradient.to(values.dtype)

    def _sizes(self, rows: Vectors, columns: Vectors) -> tuple[float | int, ...]:
        a, b = rows.values, columns.values
        return self._scale, len(a), len(b), a.shape[1], *a.stride(), *b.stride()

    def _together(self, maxima: torch.Tensor, totals: torch.Tensor) -> Denominators:
        """Of all blocks, fp32 [blocks, n] each; overwrites them."""
        if self._bounded:
            return Denominators(totals.new_zeros(totals.shape[1]), totals.sum(0))
        maximum = maxima.amax(0)
        return Denominators(maximum, totals.mul_(maxima.sub_(maximum).exp_()).sum(0))


def _kernels() -> ModuleType:
    try:
        from bert_fast.contrastive.tiles import triton_kernels
    except ImportError:
        raise UserError(
            "contrastive backend triton needs the package triton, which is not installed; "
            "python -m pip install -c constraints.txt triton"
        ) from None
    return triton_kernels


def _operands(rows: Vectors, columns: Vectors, positives: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
    """The first arguments of both kernels."""
    with_ids = rows.ids is not None and columns.ids is not None
    return (
        rows.values,
        columns.values,
        _in_a_row(positives),
        _in_a_row(rows.ids) if with_ids else None,
        _in_a_row(columns.ids) if with_ids else None,
        None if rows.limits is None else _in_a_row(rows.limits[0]),
        None if columns.limits is None else _in_a_row(columns.limits[0]),
    )


def _in_a_row(numbers: torch.Tensor | None) -> torch.Tensor | None:
    """One after the other in memory, as kernels read them."""
    return None if numbers is None else numbers.contiguous()


def _launch(blocks: Blocks) -> dict[str, int | bool]:
    """Keyword arguments of a kernel."""
    return {
        "BLOCK_M": blocks.m,
        "BLOCK_N": blocks.n,
        "BLOCK_K": blocks.k,
        "num_warps": blocks.num_warps,
        "num_stages": blocks.num_stages,
        "enable_fp_fusion": True,  # named, as its default depends on Triton's version
    }


def _blocks(kernel: str, bounded: bool, values: torch.Tensor) -> Blocks:
    """The fastest ones for embeddings like `values` [n, d]. `kernel`: forward or backward.

    Raises:
        UserError: the embeddings are on a device that has no kernels.
    """
    if _kernels().INTERPRETED:
        return _INTERPRETED
    if values.device.type != "cuda":
        raise UserError(f"contrastive backend triton needs embeddings on CUDA, not on {values.device}; use torch")
    return _fastest(kernel, bounded, values.device, values.dtype, values.shape[1])


@functools.cache
def _fastest(kernel: str, bounded: bool, device: torch.device, dtype: torch.dtype, width: int) -> Blocks:
    seconds = {}
    for blocks in _CHOICES[dtype]:
        try:
            seconds[blocks] = _seconds(_one_launch(kernel, bounded, device, dtype, width, blocks))
        except _kernels().OutOfResources:
            continue  # a device with less memory beside its cores
    best = min(seconds, key=lambda blocks: seconds[blocks])
    measured = ", ".join(f"{blocks}: {1e3 * each:.3f}" for blocks, each in seconds.items())
    _LOG.info("contrastive kernel, %s, %s of %d numbers: %s (milliseconds of %s)", kernel, dtype, width, best, measured)
    return best


def _one_launch(
    kernel: str, bounded: bool, device: torch.device, dtype: torch.dtype, width: int, blocks: Blocks
) -> Callable[[], object]:
    """Of a kernel, with random embeddings."""
    generator = torch.Generator(device).manual_seed(0)  # leaves the run's random numbers alone
    rows, columns = (
        Vectors(torch.nn.functional.normalize(torch.randn(_SIZE, width, device=device, generator=generator)).to(dtype))
        for _ in range(2)
    )
    tiles = TritonTiles(_SCALE, bounded)
    if kernel == "forward":
        sums = [Denominators.empty(_SIZE, device) for _ in range(2)]
        return lambda: tiles._add_exponentials(rows, columns, sums[0], sums[1], None, blocks)
    ones = torch.ones(_SIZE, device=device)
    weights = [Weights(_SCALE * ones, ones) for _ in range(2)]
    return lambda: tiles._gradient(rows, columns, weights[0], weights[1], None, blocks)


def _seconds(launch: Callable[[], object]) -> float:
    """The shortest of some, after one that compiles."""
    launch()
    measured = []
    for _ in range(_ROUNDS):
        torch.cuda.synchronize()
        start = time.perf_counter()
        launch()
        torch.cuda.synchronize()
        measured.append(time.perf_counter() - start)
    return min(measured)
