"""Kernels in Triton: a matrix product whose scores are used where they are computed and never written to memory.

The one module that imports the package triton; whoever imports it says what to do where that is not installed.

Both kernels have one program for each block of [BLOCK_M, BLOCK_N] scores of a tile [r, c]. No two programs write to the same
memory, so that results do not depend on their order. Arguments that both have:

rows, columns:             fp32 or bf16 [r, d], [c, d], any strides
positives:                 int64 [r] or None: the column whose score is left out
row_ids, column_ids:       int64 [r], [c] or None: where both are equal, the score is left out
row_limits, column_limits: fp32 [r], [c] or None: a score above it does not count in the softmax of the row, or of the column
scale:                     what products are multiplied by, in fp32
BOUNDED:                   scores are small enough for sums of exponentials without a maximum, and all maxima are 0
"""

from __future__ import annotations

import triton
import triton.language as tl

from bert_fast.contrastive.softmax import LOWEST

INTERPRETED: bool = triton.knobs.runtime.interpret  # kernels run on CPUs, slowly, for tests
OutOfResources = triton.runtime.errors.OutOfResources  # a block is too large for this device

_LOWEST = tl.constexpr(LOWEST)
_HIGHEST = tl.constexpr(-LOWEST)
_AS_FP32 = tl.constexpr(INTERPRETED)  # the interpreter would multiply the bits of bf16 numbers as whole numbers
_GROUP = tl.constexpr(8)  # blocks of rows that run together, so that they find the blocks of columns in the cache


@triton.jit(do_not_specialize=["num_rows", "num_columns"])
def add_exponentials(
    rows: tl.tensor,
    columns: tl.tensor,
    positives: tl.tensor,
    row_ids: tl.tensor,
    column_ids: tl.tensor,
    row_limits: tl.tensor,
    column_limits: tl.tensor,
    row_maxima: tl.tensor,
    row_totals: tl.tensor,
    column_maxima: tl.tensor,
    column_totals: tl.tensor,
    scale: tl.tensor,
    num_rows: tl.tensor,
    num_columns: tl.tensor,
    width: tl.tensor,
    row_stride: tl.tensor,
    row_step: tl.tensor,
    column_stride: tl.tensor,
    column_step: tl.tensor,
    BOUNDED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
) -> None:
    """The maximum of each row's scores within a block, and the sum of their exponentials from there; the same of columns.

    row_maxima, row_totals:       fp32 [blocks of columns, r]; of no scores at all, LOWEST and 0
    column_maxima, column_totals: fp32 [blocks of rows, c], or both None: columns have no softmax

    Maxima are not written where BOUNDED.
    """
    row_block, column_block = _block(num_rows, num_columns, BLOCK_M, BLOCK_N)
    row = row_block * BLOCK_M + tl.arange(0, BLOCK_M)
    column = column_block * BLOCK_N + tl.arange(0, BLOCK_N)
    scores = _scores(
        rows, columns, positives, row_ids, column_ids, row, column, scale, num_rows, num_columns, width,
        row_stride, row_step, column_stride, column_step, BLOCK_M, BLOCK_N, BLOCK_K,
    )  # fmt: skip
    first = column_block.to(tl.int64) * num_rows
    _write_sums(scores, row_limits, row, num_rows, row_maxima, row_totals, first, 1, BOUNDED)
    if column_totals is not None:
        first = row_block.to(tl.int64) * num_columns
        _write_sums(scores, column_limits, column, num_columns, column_maxima, column_totals, first, 0, BOUNDED)


@triton.jit(do_not_specialize=["num_rows", "num_columns"])
def write_gradient(
    rows: tl.tensor,
    columns: tl.tensor,
    positives: tl.tensor,
    row_ids: tl.tensor,
    column_ids: tl.tensor,
    row_limits: tl.tensor,
    column_limits: tl.tensor,
    row_maxima: tl.tensor,
    row_factors: tl.tensor,
    column_maxima: tl.tensor,
    column_factors: tl.tensor,
    gradient: tl.tensor,
    scale: tl.tensor,
    num_rows: tl.tensor,
    num_columns: tl.tensor,
    width: tl.tensor,
    row_stride: tl.tensor,
    row_step: tl.tensor,
    column_stride: tl.tensor,
    column_step: tl.tensor,
    gradient_stride: tl.tensor,
    BOUNDED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
) -> None:
    """The gradient by each score, exp(score - maximum) * factor of its row and of its column.

    row_maxima, row_factors:       fp32 [r]
    column_maxima, column_factors: fp32 [c], or both None: columns have no softmax
    gradient:                      fp32 or bf16 [r, c], rows `gradient_stride` numbers apart; overwritten
    """
    row_block, column_block = _block(num_rows, num_columns, BLOCK_M, BLOCK_N)
    row = row_block * BLOCK_M + tl.arange(0, BLOCK_M)
    column = column_block * BLOCK_N + tl.arange(0, BLOCK_N)
    scores = _scores(
        rows, columns, positives, row_ids, column_ids, row, column, scale, num_rows, num_columns, width,
        row_stride, row_step, column_stride, column_step, BLOCK_M, BLOCK_N, BLOCK_K,
    )  # fmt: skip
    total = _part(scores, row_limits, row, num_rows, row_maxima, row_factors, 1, BOUNDED)
    if column_factors is not None:
        total += _part(scores, column_limits, column, num_columns, column_maxima, column_factors, 0, BOUNDED)
    place = gradient + row[:, None].to(tl.int64) * gradient_stride + column[None, :]
    here = (row < num_rows)[:, None] & (column < num_columns)[None, :]
    tl.store(place, total.to(gradient.dtype.element_ty), mask=here)


@triton.jit
def _block(
    num_rows: tl.tensor, num_columns: tl.tensor, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr
) -> tuple[tl.tensor, tl.tensor]:
    """The numbers of this program's blocks of rows and of columns."""
    row_blocks = tl.cdiv(num_rows, BLOCK_M)
    in_group = _GROUP * tl.cdiv(num_columns, BLOCK_N)
    program = tl.program_id(0)
    first = program // in_group * _GROUP
    height = tl.minimum(row_blocks - first, _GROUP)  # the last group has fewer
    return first + program % in_group % height, program % in_group // height


@triton.jit
def _scores(
    rows: tl.tensor,
    columns: tl.tensor,
    positives: tl.tensor,
    row_ids: tl.tensor,
    column_ids: tl.tensor,
    row: tl.tensor,
    column: tl.tensor,
    scale: tl.tensor,
    num_rows: tl.tensor,
    num_columns: tl.tensor,
    width: tl.tensor,
    row_stride: tl.tensor,
    row_step: tl.tensor,
    column_stride: tl.tensor,
    column_step: tl.tensor,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
) -> tl.tensor:
    """fp32 [BLOCK_M, BLOCK_N], -inf where a score is left out and where there is none."""
    has_row, has_column = row < num_rows, column < num_columns
    k = tl.arange(0, BLOCK_K)
    # Offsets of 64 bits: a tile is a view of any number of embeddings
    row_places = rows + row[:, None].to(tl.int64) * row_stride + k[None, :].to(tl.int64) * row_step
    column_places = columns + column[None, :].to(tl.int64) * column_stride + k[:, None].to(tl.int64) * column_step
    total = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for start in range(0, width, BLOCK_K):
        has_k = k < width - start
        a = tl.load(row_places, mask=has_row[:, None] & has_k[None, :], other=0.0)
        b = tl.load(column_places, mask=has_k[:, None] & has_column[None, :], other=0.0)
        if _AS_FP32:
            a, b = a.to(tl.float32), b.to(tl.float32)
        total = tl.dot(a, b, total, input_precision="ieee")
        row_places += BLOCK_K * row_step
        column_places += BLOCK_K * column_step
    counts = has_row[:, None] & has_column[None, :]
    if positives is not None:
        own = tl.load(positives + row, mask=has_row, other=-1)
        own = tl.where((own >= 0) & (own < num_columns), own, -1).to(tl.int32)
        counts &= own[:, None] != column[None, :]
    if row_ids is not None:
        row_id = tl.load(row_ids + row, mask=has_row, other=0)
        column_id = tl.load(column_ids + column, mask=has_column, other=0)
        counts &= row_id[:, None] != column_id[None, :]
    return tl.where(counts, total * scale, float("-inf"))


@triton.jit
def _write_sums(
    scores: tl.tensor,
    limits: tl.tensor,
    number: tl.tensor,
    num: tl.tensor,
    maxima: tl.tensor,
    totals: tl.tensor,
    first: tl.tensor,
    AXIS: tl.constexpr,
    BOUNDED: tl.constexpr,
) -> None:
    """Of each row (AXIS 1) or column (AXIS 0) of a block, from place `first` of maxima and totals."""
    here = number < num
    if limits is not None:
        limit = tl.load(limits + number, mask=here, other=0.0)
        scores = tl.where(scores > tl.expand_dims(limit, AXIS), float("-inf"), scores)
    if BOUNDED:
        exps = tl.exp(scores)
    else:
        maximum = tl.maximum(tl.max(scores, AXIS), _LOWEST)  # where there are only -inf, -inf - LOWEST is -inf
        tl.store(maxima + first + number, maximum, mask=here)
        exps = tl.exp(scores - tl.expand_dims(maximum, AXIS))
    tl.store(totals + first + number, tl.sum(exps, AXIS), mask=here)


@triton.jit
def _part(
    scores: tl.tensor,
    limits: tl.tensor,
    number: tl.tensor,
    num: tl.tensor,
    maxima: tl.tensor,
    factors: tl.tensor,
    AXIS: tl.constexpr,
    BOUNDED: tl.constexpr,
) -> tl.tensor:
    """exp(score - maximum) * factor of the softmaxes of rows (AXIS 1) or columns (AXIS 0)."""
    here = number < num
    factor = tl.load(factors + number, mask=here, other=0.0)
    if BOUNDED:
        exps = tl.exp(scores)
    else:
        maximum = tl.load(maxima + number, mask=here, other=0.0)
        maximum = tl.where(factor == 0.0, _HIGHEST, maximum)  # of an empty softmax it is LOWEST: infinity times 0
        exps = tl.exp(scores - tl.expand_dims(maximum, AXIS))
    if limits is not None:
        limit = tl.load(limits + number, mask=here, other=0.0)
        exps = tl.where(scores > tl.expand_dims(limit, AXIS), 0.0, exps)
    return exps * tl.expand_dims(factor, AXIS)
