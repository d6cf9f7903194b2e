"""Tiles by kernels in Triton, on the CPU in Triton's interpreter: against all scores in fp64, and against tiles of torch.

The interpreter is chosen when the package triton is imported. These tests leave it alone in pytest's own process, where others
may want it for a GPU, and ask a process of their own, in which every warning is an error.
"""

from __future__ import annotations

import importlib
import logging
import sys
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from support.contrastive import OPTIONS, expected, make_pairs, relative_error

from bert_fast.compression.compiled import has_triton
from bert_fast.contrastive import computation
from bert_fast.contrastive.embeddings import Pairs
from bert_fast.contrastive.loss import ContrastiveLoss
from bert_fast.contrastive.options import LossOptions
from bert_fast.contrastive.softmax import LOWEST, Denominators, Weights
from bert_fast.contrastive.tiles import triton_tiles
from bert_fast.contrastive.tiles.base import Tiles
from bert_fast.contrastive.tiles.plain import TorchTiles
from bert_fast.contrastive.tiles.triton_tiles import Blocks, TritonTiles
from bert_fast.contrastive.tiles.widths import WidthTiles
from bert_fast.contrastive.vectors import Gradient, Vectors
from bert_fast.errors import UserError

NAMES = [name for name, options in OPTIONS.items() if not options.widths]
CPU = torch.device("cpu")
needs_triton = pytest.mark.skipif(not has_triton(), reason="the package triton is not installed")


@pytest.fixture(scope="module")
def interpreted() -> Iterator[Callable[..., Any]]:
    """`interpreted(f, *args)`: f(*args) in a process where Triton's kernels are interpreted."""
    with pytest.MonkeyPatch.context() as patch, ProcessPoolExecutor(1, get_context("spawn"), _prepare) as pool:
        patch.setenv("TRITON_INTERPRET", "1")
        yield lambda function, *args: pool.submit(function, *args).result()


def _prepare() -> None:
    warnings.simplefilter("error")
    torch.set_num_threads(1)
    # New memory is NaN, so that what a kernel has not written cannot go unseen
    torch.use_deterministic_algorithms(True)


# ---- the whole loss against fp64 ------------------------------------------------------------------------------------


def errors(pairs: Pairs, scale: float, options: LossOptions, tile: tuple[int, int]) -> list[float]:
    """Relative ones of the loss and of its gradients by queries, keys and the scale."""
    if options.precision == "bf16":
        pairs = replace(pairs, queries=pairs.queries.bfloat16().float(), keys=pairs.keys.bfloat16().float())
    right = expected(pairs, scale, options)
    module = ContrastiveLoss(options, scale=scale, learn_scale=True, tile=tile, backend="triton")
    queries, keys = (x.clone().requires_grad_() for x in (pairs.queries, pairs.keys))
    loss = module(queries, keys, pairs.positives, pairs.query_ids, pairs.key_ids)
    loss.backward()
    assert queries.grad is not None
    assert keys.grad is not None
    assert module.log_scale is not None
    assert module.log_scale.grad is not None
    return [
        abs(loss.item() / right.loss - 1),
        relative_error(queries.grad, right.by_queries),
        relative_error(keys.grad, right.by_keys),
        abs(module.log_scale.grad.item() / scale / right.by_scale - 1),
    ]


@needs_triton
@pytest.mark.parametrize(
    ("width", "scale", "with_ids"),
    [
        (96, 20.0, False),
        (96, 20.0, True),
        (96, 100.0, False),
        (96, 100.0, True),
        (770, 20.0, True),
        (770, 100.0, False),
    ],
)
@pytest.mark.parametrize("name", NAMES)
def test_loss_and_gradients(
    interpreted: Callable[..., Any], name: str, width: int, scale: float, with_ids: bool
) -> None:
    """41 queries with 54 keys in tiles of 44 columns and blocks of 32 x 32; scores are bounded at scale 20 alone."""
    pairs = make_pairs(41, 13, width, seed=7, with_ids=with_ids)
    assert max(interpreted(errors, pairs, scale, OPTIONS[name], (48, 44))) < 3e-6


@needs_triton
@pytest.mark.parametrize(("scale", "width"), [(20.0, 96), (100.0, 770)])
@pytest.mark.parametrize("name", NAMES)
def test_bf16(interpreted: Callable[..., Any], name: str, width: int, scale: float) -> None:
    """The gradients by scores are rounded to bf16 as well, but not the loss. Of other embeddings they may nearly cancel."""
    pairs = make_pairs(41, 13, width, seed=0, with_ids=True)
    loss, by_queries, by_keys, _ = interpreted(errors, pairs, scale, replace(OPTIONS[name], precision="bf16"), (48, 44))
    assert loss < 1e-5  # scores of up to 100 have an error of 4e-6 in fp32
    assert by_queries < 6e-3
    assert by_keys < 6e-3


@needs_triton
@pytest.mark.parametrize(
    ("tile", "scale"),
    [((15, 19), 20.0), ((15, 200), 50.0), ((200, 19), 50.0), ((1000, 1000), 20.0), ((1000, 1000), 50.0)],
)
def test_every_tile_is_the_same_loss(interpreted: Callable[..., Any], tile: tuple[int, int], scale: float) -> None:
    pairs = make_pairs(33, 7, 17, seed=3)
    assert max(interpreted(errors, pairs, scale, LossOptions(), tile)) < 3e-6


@needs_triton
def test_a_loss_of_nearly_nothing_keeps_its_digits(interpreted: Callable[..., Any]) -> None:
    """Every key is its query: the loss is 5e-7."""
    queries = F.normalize(torch.randn(20, 96, generator=torch.Generator().manual_seed(0)), dim=1)
    found = interpreted(errors, Pairs(queries, queries.clone(), torch.arange(20)), 20.0, LossOptions(), (48, 44))
    assert max(found) < 3e-6


# ---- a tile against torch's ------------------------------------------------------------------------------------------


def poisoned(values: torch.Tensor, poison: float) -> torch.Tensor:
    """The same numbers as a view of memory that holds `poison` on all sides of them."""
    around = torch.full([size + 70 for size in values.shape], poison, dtype=values.dtype)
    view = around[tuple(slice(3, 3 + size) for size in values.shape)]
    return view.copy_(values)


def same(values: torch.Tensor, _poison: float) -> torch.Tensor:
    return values


def tile_of(tiles: Tiles, num_rows: int, num_columns: int, width: int, with_columns: bool, place: Any) -> list[Any]:
    """What tiles add to sums and to gradients, all of them with what a tile can have. `place`: see `poisoned`.

    Row 1 and column 2 have no score at all: ids of one side that are equal to all of the other's, and a limit below all scores.
    """
    g = torch.Generator().manual_seed(0)
    nan = float("nan")
    sides = []
    for num in (num_rows, num_columns):
        values = place(F.normalize(torch.randn(num, width, generator=g), dim=1), nan)
        limits = place(torch.linspace(0.05, 0.2, num) * 20, nan)
        ids = place(torch.randint(0, 9, (num,), generator=g), 5)
        sides.append(Vectors(values, ids, limits[None]))
    rows, columns = sides
    assert rows.limits is not None
    assert columns.limits is not None
    rows.limits[0, 1] = columns.limits[0, 2] = -21.0
    positives = place(torch.arange(num_rows) - 3, 1)  # some are no columns
    sums = [Denominators(*(place(x, nan) for x in Denominators.empty(n, CPU))) for n in (num_rows, num_columns)]
    of_columns = [sums[1]] if with_columns else None
    tiles.forward(rows, columns, [sums[0]], of_columns, positives)
    tiles.forward(rows, columns, [sums[0]], of_columns, None)
    weights = [
        Weights(
            place(x.maximum.clone(), nan),
            place(torch.where(x.total > 0, torch.rand(len(x.total), generator=g), 0.0), nan),
        )
        for x in sums
    ]
    gradients = [Gradient.zeros(side.values, 0) for side in sides]
    tiles.backward(rows, columns, [weights[0]], [weights[1]] if with_columns else None, positives, *gradients)
    return [*sums, [each.values for each in gradients]]


def compared(shape: tuple[int, int, int], with_columns: bool, place: Any, blocks: Blocks) -> list[Any]:
    """Sums and gradients of kernels with these blocks, after they were found to be those of torch."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(triton_tiles, "_INTERPRETED", blocks)
        found = tile_of(TritonTiles(20.0, False), *shape, with_columns, place)
    right = tile_of(TorchTiles(20.0, False), *shape, with_columns, same)
    for ours, theirs in zip(found, right, strict=True):
        for a, b in zip(ours, theirs, strict=True):
            torch.testing.assert_close(a, b, rtol=3e-6, atol=3e-6)
    return [[each.clone() for each in pair] for pair in found]


@needs_triton
@pytest.mark.parametrize("with_columns", [False, True])
def test_what_lies_beside_the_operands_is_not_read(interpreted: Callable[..., Any], with_columns: bool) -> None:
    interpreted(compared, (21, 37, 19), with_columns, poisoned, Blocks(16, 16, 16, 1, 1))


@needs_triton
def test_rows_and_columns_without_any_score(interpreted: Callable[..., Any]) -> None:
    of_rows, of_columns, (by_rows, by_columns) = interpreted(compared, (5, 6, 8), True, same, Blocks(16, 16, 16, 1, 1))
    assert [x[1].item() for x in of_rows] == [LOWEST_IN_FP32, 0.0]
    assert [x[2].item() for x in of_columns] == [LOWEST_IN_FP32, 0.0]
    assert by_rows.isfinite().all()
    assert by_columns.isfinite().all()


LOWEST_IN_FP32 = torch.tensor(LOWEST).item()


@needs_triton
@pytest.mark.parametrize("shape", [(150, 20, 8), (20, 150, 8)])
def test_more_blocks_than_run_together(interpreted: Callable[..., Any], shape: tuple[int, int, int]) -> None:
    interpreted(compared, shape, True, same, Blocks(16, 16, 16, 1, 1))


# ---- which tiles and which blocks ------------------------------------------------------------------------------------


def test_kernels_are_for_cuda_where_triton_is_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    for installed, on_cuda in ((True, "triton"), (False, "torch")):
        monkeypatch.setattr(computation, "has_triton", lambda installed=installed: installed)
        assert computation.default_backend(torch.device("cuda", 0), torch.bfloat16) == on_cuda
        assert computation.default_backend(CPU, torch.bfloat16) == "torch"
    assert isinstance(computation.maker_of((4, 8), "triton")(1.0, True), WidthTiles)


def test_without_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "triton", None)
    monkeypatch.delitem(sys.modules, "bert_fast.contrastive.tiles.triton_kernels", raising=False)
    monkeypatch.delattr("bert_fast.contrastive.tiles.triton_kernels", raising=False)
    with pytest.raises(UserError, match="not installed; python -m pip install -c constraints.txt triton"):
        TritonTiles(20.0, True)


def test_embeddings_on_a_device_without_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_tiles, "_kernels", lambda: SimpleNamespace(INTERPRETED=False))
    vectors = Vectors(torch.ones(2, 4))
    with pytest.raises(UserError, match="needs embeddings on CUDA, not on cpu"):
        TritonTiles(20.0, True).forward(vectors, vectors, [Denominators.empty(2, CPU)], None, None)


def test_the_fastest_blocks_that_fit_are_taken_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    class DoesNotFitError(Exception):
        pass

    timed: list[Blocks] = []

    def seconds(blocks: Blocks) -> float:
        timed.append(blocks)
        if blocks.n == 256:
            raise DoesNotFitError
        return 2e-3 if blocks.num_warps == 8 else 1e-3 * blocks.k

    monkeypatch.setattr(
        triton_tiles, "_kernels", lambda: SimpleNamespace(INTERPRETED=False, OutOfResources=DoesNotFitError)
    )
    monkeypatch.setattr(triton_tiles, "_one_launch", lambda *arguments: arguments[-1])
    monkeypatch.setattr(triton_tiles, "_seconds", seconds)
    triton_tiles._fastest.cache_clear()
    embeddings = SimpleNamespace(device=torch.device("cuda", 0), dtype=torch.bfloat16, shape=(8, 768))
    with caplog.at_level(logging.INFO):
        found = [triton_tiles._blocks("forward", True, embeddings) for _ in range(2)]  # type: ignore[arg-type]
    triton_tiles._fastest.cache_clear()
    assert found == [Blocks(128, 128, 64, 8, 3)] * 2
    assert len(timed) == len(triton_tiles._CHOICES[torch.bfloat16])
    assert "forward, torch.bfloat16 of 768 numbers: 128x128x64 in 8 warps, 3 stages (milliseconds of" in caplog.text


# ---- for a GPU ---------------------------------------------------------------------------------------------------------


def shared_memory(kernel: str, dtype: torch.dtype, blocks: Blocks, bounded: bool) -> int:
    """Bytes that a program of a kernel, compiled for an H100 with everything that a tile can have, needs beside registers."""
    import triton
    from triton.backends.compiler import GPUTarget

    function = getattr(importlib.import_module("bert_fast.contrastive.tiles.triton_kernels"), kernel)
    embeddings = "*bf16" if dtype == torch.bfloat16 else "*fp32"
    fixed = {
        "BOUNDED": bounded,
        "BLOCK_M": blocks.m,
        "BLOCK_N": blocks.n,
        "BLOCK_K": blocks.k,
        "row_step": 1,
        "column_step": 1,
    }
    types = dict.fromkeys(function.arg_names, "*fp32") | dict.fromkeys(fixed, "constexpr")
    for name in function.arg_names:
        if name in ("rows", "columns", "gradient"):
            types[name] = embeddings
        elif name in ("positives", "row_ids", "column_ids"):
            types[name] = "*i64"
        elif name == "scale":
            types[name] = "fp32"
        elif name.startswith("num_") or name == "width" or name.endswith("_stride"):
            types[name] = "i32"
    places = [number for number, name in enumerate(function.arg_names) if types[name].startswith("*")]
    compiled = triton.compile(
        triton.compiler.ASTSource(
            function, types, {(function.arg_names.index(name),): value for name, value in fixed.items()},
            {(number,): [["tt.divisibility", 16]] for number in places},
        ),
        target=GPUTarget("cuda", 90, 32),
        options={"num_warps": blocks.num_warps, "num_stages": blocks.num_stages, "enable_fp_fusion": True},
    )  # fmt: skip
    assert compiled.asm["cubin"]
    return int(compiled.metadata.shared)


@needs_triton
@pytest.mark.slow
def test_kernels_compile_for_a_gpu(tmp_path: Path) -> None:
    """Without one. The interpreter runs Python that the compiler refuses."""
    with pytest.MonkeyPatch.context() as patch, ProcessPoolExecutor(1, get_context("spawn"), _prepare) as pool:
        patch.setenv("TRITON_CACHE_DIR", str(tmp_path))
        patch.delenv("TRITON_INTERPRET", raising=False)
        for kernel in ("add_exponentials", "write_gradient"):
            for dtype, choices in triton_tiles._CHOICES.items():
                for blocks, bounded in ((choices[0], False), (choices[-1], True)):
                    assert pool.submit(shared_memory, kernel, dtype, blocks, bounded).result() <= 227 * 1024
