"""What windows of sparse gradients need of `kernels.c`. Every function says by None that it cannot do what is asked here."""

from __future__ import annotations

import ctypes

import torch

from bert_fast.compression.native import library, num_parts, over_threads, pointer

_int = ctypes.c_int64


def largest_of_blocks(blocks: torch.Tensor) -> torch.Tensor | None:
    """int64 [rows, blocks, 1]: the place of the largest magnitude of each block of fp32 [rows, blocks, block]."""
    kernels = library()
    if kernels is None or not _is_fp32_here(blocks):
        return None
    rows, count, block = blocks.shape
    places = torch.empty(rows, count, 1, dtype=torch.int64)

    def run(_: int, first: int, end: int) -> None:
        kernels.select_largest(pointer(blocks, first * block), _int(end - first), _int(block), pointer(places, first))

    over_threads(rows * count, run)
    return places


def products(places: torch.Tensor, stored: torch.Tensor, values: torch.Tensor) -> torch.Tensor | None:
    """fp64 [m]: scalar products of a window's rows with fp32 `values` [blocks, block].

    Args:
        places: int16 [blocks, selected, m].
        stored: bf16 of that shape.
    """
    kernels = library()
    if kernels is None or not _can(places, stored) or not _is_fp32_here(values):
        return None
    blocks, selected, m = places.shape
    parts = num_parts(blocks)
    sums, scratch = torch.zeros(parts, m, dtype=torch.float64), torch.empty(parts, m)

    def run(number: int, first: int, end: int) -> None:
        kernels.window_products(
            pointer(places, first * selected * m), pointer(stored, first * selected * m), _int(end - first),
            _int(selected), _int(m), _int(values.shape[1]), pointer(values, first * values.shape[1]),
            pointer(scratch, number * m), pointer(sums, number * m),
        )  # fmt: skip

    over_threads(blocks, run)
    return sums.sum(dim=0)


def products_of_row(places: torch.Tensor, stored: torch.Tensor, newest: int, block: int) -> torch.Tensor | None:
    """fp64 [m]: scalar products of a window's rows with its row `newest`."""
    kernels = library()
    if kernels is None or not _can(places, stored):
        return None
    blocks, selected, m = places.shape
    parts = num_parts(blocks)
    sums, scratch, dense = torch.zeros(parts, m, dtype=torch.float64), torch.empty(parts, m), torch.zeros(parts, block)

    def run(number: int, first: int, end: int) -> None:
        kernels.window_products_of_row(
            pointer(places, first * selected * m), pointer(stored, first * selected * m), _int(end - first),
            _int(selected), _int(m), _int(newest), pointer(dense, number * block), pointer(scratch, number * m),
            pointer(sums, number * m),
        )  # fmt: skip

    over_threads(blocks, run)
    return sums.sum(dim=0)


def feed_back_largest(
    values: torch.Tensor, residual: torch.Tensor, block: int
) -> tuple[torch.Tensor, torch.Tensor] | None:
    """Add a residual to fp32 `values` [length], in place, and keep in it what is left once the largest of each block is taken.

    Args:
        residual: bf16 [length].

    Returns:
        places, int16, and values, bf16, of what was taken, both [blocks, 1].
    """
    kernels, length = library(), len(values)
    if kernels is None or not _is_fp32_here(values) or residual.dtype != torch.bfloat16:
        return None
    blocks = -(-length // block)
    places, selected = torch.empty(blocks, 1, dtype=torch.int16), torch.empty(blocks, 1, dtype=torch.bfloat16)

    def run(_: int, first: int, end: int) -> None:
        kernels.feed_back_largest(
            pointer(values), pointer(residual), _int(first), _int(end), _int(block), _int(length), pointer(places),
            pointer(selected),
        )  # fmt: skip

    over_threads(blocks, run)
    return places, selected


def combine(
    places: torch.Tensor, stored: torch.Tensor, coefficients: torch.Tensor, block: int, squares: bool
) -> torch.Tensor | None:
    """fp32 [blocks, block]: the sum of a window's rows, or of their squares, each times its coefficient, fp32 [m]."""
    kernels = library()
    if kernels is None or not _can(places, stored) or not _is_fp32_here(coefficients):
        return None
    blocks, selected, m = places.shape
    out = torch.empty(blocks, block)

    def run(_: int, first: int, end: int) -> None:
        kernels.window_combine(
            pointer(places, first * selected * m), pointer(stored, first * selected * m), _int(end - first),
            _int(selected), _int(m), _int(block), pointer(coefficients), _int(squares), pointer(out, first * block),
        )  # fmt: skip

    over_threads(blocks, run)
    return out


def _is_fp32_here(values: torch.Tensor) -> bool:
    return values.device.type == "cpu" and values.dtype == torch.float32 and values.is_contiguous()


def _can(places: torch.Tensor, stored: torch.Tensor) -> bool:
    on_cpu = places.device.type == stored.device.type == "cpu"
    return on_cpu and stored.dtype == torch.bfloat16 and places.is_contiguous() and stored.is_contiguous()
