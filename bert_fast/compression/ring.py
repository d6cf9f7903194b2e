"""The window of the last m compressed gradients, with all their scalar products.

A full-matrix preconditioner over a window G [m, numel] needs G only for its Gram matrix G G^T, of which one row changes a step,
and for linear combinations of its rows (arXiv 2306.06098, sections 3 and 4). Three windows with one interface: dense (the
oracle), block-sparse (Top-K), and of low rank.

The Gram matrix is kept in fp64: it is m x m, and what is made of it divides by small numbers.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from bert_fast.compression.compiled import on
from bert_fast.compression.error_feedback import ErrorFeedback
from bert_fast.compression.native import windows
from bert_fast.compression.quantize import in_blocks
from bert_fast.compression.topk import TopK

_CUDA_STRETCH = 2**25
_STRETCH = 2**16  # stored numbers of whose places 64-bit copies are made at a time


class Window(ABC):
    """A ring buffer of m rows of `numel` numbers.

    gram: fp64 [m, m], scalar products of the rows as they are stored; zeros where there is no row yet
    head: where the next row goes
    """

    def __init__(self, m: int, numel: int, device: torch.device | str = "cpu") -> None:
        self.m, self.numel, self.head, self.count = m, numel, 0, 0
        self.gram = torch.zeros(m, m, dtype=torch.float64, device=device)

    def clear(self) -> None:
        """Have no rows."""
        for tensor in (*self.tensors().values(), self.gram):
            tensor.zero_()
        self.head = self.count = 0

    def replace_products(self, products: torch.Tensor) -> None:
        """Take these for the newest row's scalar products [m]: the sums over ranks that have a part of each row."""
        self.gram[self.newest] = products
        self.gram[:, self.newest] = products

    @property
    def newest(self) -> int:
        """The place of the row that was pushed last."""
        return (self.head - 1) % self.m

    def ages(self) -> torch.Tensor:
        """int64 [m]: how many rows were pushed after each; places that have no row yet count as if they had one."""
        return (self.newest - torch.arange(self.m, device=self.gram.device)) % self.m

    def _pushed(self, products: torch.Tensor) -> None:
        """Put the new row's scalar products [m] into the Gram matrix, and go on to the next place."""
        self.gram[self.head] = products
        self.gram[:, self.head] = products
        self.head, self.count = (self.head + 1) % self.m, min(self.count + 1, self.m)

    @abstractmethod
    def products(self, values: torch.Tensor) -> torch.Tensor:
        """fp64 [m]: scalar products of the rows with fp32 `values` [numel]."""

    @abstractmethod
    def combine(self, coefficients: torch.Tensor) -> torch.Tensor:
        """fp32 [numel]: the sum of the rows, each times its coefficient [m]."""

    @abstractmethod
    def tensors(self) -> dict[str, torch.Tensor]:
        """What the rows are stored in."""

    @property
    def num_bytes(self) -> int:
        """Bytes of the rows and of the Gram matrix."""
        return sum(t.numel() * t.element_size() for t in (*self.tensors().values(), self.gram))

    def state_dict(self) -> dict[str, Any]:
        """The rows, their products and the place in the ring, as copies."""
        held = {name: tensor.clone() for name, tensor in self.tensors().items()}
        return {"rows": held, "gram": self.gram.clone(), "head": self.head, "count": self.count}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up what `state_dict` gave. Raises ValueError where it is of another window."""
        mine = self.tensors()
        shapes = {name: (t.shape, t.dtype) for name, t in state["rows"].items()}
        if shapes != {name: (t.shape, t.dtype) for name, t in mine.items()} or state["gram"].shape != self.gram.shape:
            raise ValueError("a window of gradients of another size or format")
        for name, tensor in mine.items():
            tensor.copy_(state["rows"][name])
        self.gram.copy_(state["gram"])
        self.head, self.count = state["head"], state["count"]


class DenseWindow(Window):
    """Whole rows in fp32, or in fp64 for tests."""

    def __init__(
        self, m: int, numel: int, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
    ) -> None:
        super().__init__(m, numel, device)
        self._rows = torch.zeros(m, numel, dtype=dtype, device=device)

    def push(self, values: torch.Tensor) -> None:
        """Put `values` [numel] in the place of the oldest row."""
        self._rows[self.head] = values
        self._pushed(self.products(values))

    def products(self, values: torch.Tensor) -> torch.Tensor:
        # Partial sums in fp32 over stretches that are short enough not to lose digits, added up in fp64
        stretches = self.numel // 4096
        whole = stretches * 4096
        rows, wide = self._rows, values.to(self._rows.dtype)
        total = rows[:, whole:].double() @ wide[whole:].double()
        if stretches:
            parts = torch.einsum(
                "mbk,bk->mb", rows[:, :whole].unflatten(1, (stretches, 4096)), wide[:whole].view(-1, 4096)
            )
            total += parts.double().sum(dim=1)
        return total

    def combine(self, coefficients: torch.Tensor) -> torch.Tensor:
        return coefficients.to(self._rows.dtype) @ self._rows

    def tensors(self) -> dict[str, torch.Tensor]:
        return {"values": self._rows}


class SparseWindow(Window):
    """Rows of block Top-K: 16-bit places and values, stored by blocks, so that a block's numbers stay in a core's cache."""

    def __init__(
        self,
        m: int,
        numel: int,
        top_k: TopK,
        device: torch.device | str = "cpu",
        keeps_products: bool = True,
    ) -> None:
        """
        Args:
            keeps_products: whether the Gram matrix is kept up to date; otherwise it stays zero.
        """
        super().__init__(m, numel, device)
        self._top_k, self._keeps_products = top_k, keeps_products
        self._blocks, self._selected = top_k.shape(numel)
        self._block = min(top_k.block, numel)
        shape = self._blocks, self._selected, m
        self._places = torch.zeros(shape, dtype=torch.int16, device=device)
        self._values = torch.zeros(shape, dtype=top_k.dtype, device=device)

    def push(self, places: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        """Put a row that `TopK.select` gave, both [blocks, selected], in the place of the oldest; returns it, fp32 [numel]."""
        row = self._top_k.scatter(places[None], values[None], self.numel)[0]
        self._store(places, values, row)
        return row

    def push_largest(self, values: torch.Tensor, feedback: ErrorFeedback) -> bool:
        """Select a row of fp32 `values` [numel] with what `feedback` has of them, push it, and let `feedback` keep the rest.

        In one pass over memory, where one number of each block is kept as bf16, the loops in C are there, and the residual is
        bf16 of one copy; else nothing is done. `values` are changed.

        Returns:
            Whether it was done.
        """
        residual = feedback.plain_bf16()
        if self._selected != 1 or self._values.dtype != torch.bfloat16 or residual is None:
            return False
        found = windows.feed_back_largest(values, residual, self._block)
        if found is None:
            return False
        self._store(*found, None)
        return True

    def _store(self, places: torch.Tensor, values: torch.Tensor, row: torch.Tensor | None) -> None:
        self._places[:, :, self.head], self._values[:, :, self.head] = places, values
        if not self._keeps_products:
            self._pushed(torch.zeros_like(self.gram[0]))
            return
        products = windows.products_of_row(self._places, self._values, self.head, self._block)
        if products is None:
            assert row is not None, "who has no row has the loops in C"
            products = self.products(row)
        self._pushed(products)

    def products(self, values: torch.Tensor) -> torch.Tensor:
        blocks = in_blocks(values[None], self._block)[0]
        found_natively = windows.products(self._places, self._values, blocks)
        if found_natively is not None:
            return found_natively
        total = torch.zeros(self.m, dtype=torch.float64, device=values.device)
        for low, high, places in self._stretches():
            stored = self._values[low:high]
            total += on(values.device, _products)(blocks[low:high], places, stored)
        return total

    def combine(self, coefficients: torch.Tensor) -> torch.Tensor:
        return self._combine(coefficients, squares=False)

    def combine_squares(self, coefficients: torch.Tensor) -> torch.Tensor:
        """fp32 [numel]: the sum of the rows' squares, element by element, each row's times its coefficient [m]."""
        return self._combine(coefficients, squares=True)

    def _combine(self, coefficients: torch.Tensor, squares: bool) -> torch.Tensor:
        weights = coefficients.to(torch.float32)
        found_natively = windows.combine(self._places, self._values, weights, self._block, squares)
        if found_natively is not None:
            return found_natively.view(-1)[: self.numel]
        sums = torch.zeros(self._blocks, self._block, device=self._values.device)
        for low, high, places in self._stretches():
            stored = self._values[low:high]
            on(sums.device, _add_rows)(sums[low:high], places, stored, weights, squares)
        return sums.view(-1)[: self.numel]

    def tensors(self) -> dict[str, torch.Tensor]:
        return {"places": self._places, "values": self._values}

    def _stretches(self) -> Iterator[tuple[int, int, torch.Tensor]]:
        """(first, end, places) of blocks a few at a time: what is made of them for a moment stays in a core's cache, or
        is a small part of a GPU's memory.

        places: int64 [end - first, selected * m], to be used before the next stretch: all have the same memory
        """
        width = self.m * self._selected
        together = max(1, (_STRETCH if self._places.device.type == "cpu" else _CUDA_STRETCH) // width)
        index = torch.empty(min(together, self._blocks), width, dtype=torch.int64, device=self._places.device)
        for low in range(0, self._blocks, together):
            high = min(low + together, self._blocks)
            yield low, high, index[: high - low].copy_(self._places[low:high].flatten(1))


def _products(blocks: torch.Tensor, places: torch.Tensor, stored: torch.Tensor) -> torch.Tensor:
    """fp32 [m]: scalar products of rows [blocks, selected, m] with [blocks, block]."""
    return (torch.gather(blocks, 1, places).view(stored.shape) * stored).sum(dim=(0, 1))


def _add_rows(
    sums: torch.Tensor, places: torch.Tensor, stored: torch.Tensor, weights: torch.Tensor, squares: bool
) -> None:
    """Add rows [blocks, selected, m], or their squares, each times its weight, to `sums` [blocks, block]."""
    wide = stored.to(torch.float32)
    sums.scatter_add_(1, places, ((wide.square() if squares else wide) * weights).flatten(1))


class LowRankWindow(Window):
    """Rows made of matrices P Q^T [rows, columns], each pair [rows, r] and [columns, r], and of numbers that stay whole.

    The scalar product of two of them is the sum of the elements of (P^T P') o (Q^T Q').
    """

    def __init__(
        self,
        m: int,
        shapes: Sequence[tuple[int, int]],
        rank: int,
        num_whole: int,
        device: torch.device | str = "cpu",
    ) -> None:
        """
        Args:
            shapes: rows and columns of the matrices.
            num_whole: numbers that are no part of a matrix; they come last in a row.
        """
        super().__init__(m, sum(rows * columns for rows, columns in shapes) + num_whole, device)
        self._shapes = list(shapes)
        ranks = [min(rank, *shape) for shape in shapes]
        sizes = zip(self._shapes, ranks, strict=True)
        pairs = [(torch.zeros(m, n, r, device=device), torch.zeros(m, k, r, device=device)) for (n, k), r in sizes]
        self._left, self._right = [left for left, _ in pairs], [right for _, right in pairs]
        self._whole = torch.zeros(m, num_whole, device=device)

    def push(self, factors: Sequence[tuple[torch.Tensor, torch.Tensor]], whole: torch.Tensor) -> None:
        """Put a row in the place of the oldest."""
        for number, (left, right) in enumerate(factors):
            self._left[number][self.head], self._right[number][self.head] = left, right
        self._whole[self.head] = whole
        products = (self._whole @ whole).double()
        for number, (left, right) in enumerate(factors):
            lefts = torch.einsum("mnr,ns->mrs", self._left[number], left)
            rights = torch.einsum("mkr,ks->mrs", self._right[number], right)
            products += (lefts.double() * rights.double()).sum(dim=(1, 2))
        self._pushed(products)

    def products(self, values: torch.Tensor) -> torch.Tensor:
        *matrices, whole = self.split(values)
        total = (self._whole @ whole).double()
        for left, right, matrix in zip(self._left, self._right, matrices, strict=True):
            total += torch.einsum("mnr,mnr->m", left, torch.einsum("nk,mkr->mnr", matrix, right)).double()
        return total

    def combine(self, coefficients: torch.Tensor) -> torch.Tensor:
        weights = coefficients.to(torch.float32)
        parts = [
            ((left * weights[:, None, None]).transpose(0, 1).flatten(1) @ right.transpose(0, 1).flatten(1).T).view(-1)
            for left, right in zip(self._left, self._right, strict=True)
        ]
        return torch.cat([*parts, weights @ self._whole])

    def tensors(self) -> dict[str, torch.Tensor]:
        pairs = enumerate(zip(self._left, self._right, strict=True))
        named = {
            f"{side}{number}": t for number, pair in pairs for side, t in zip(("left", "right"), pair, strict=True)
        }
        return {**named, "whole": self._whole}

    def split(self, values: torch.Tensor) -> list[torch.Tensor]:
        """The matrices, and the numbers that stay whole, as views of `values` [numel]."""
        sizes = [rows * columns for rows, columns in self._shapes]
        *matrices, whole = values.split([*sizes, self._whole.shape[1]])
        return [*(m.view(shape) for m, shape in zip(matrices, self._shapes, strict=True)), whole]
