"""One batch's loss and gradients on one rank: sweeps of queries with keys and, where asked, of queries with queries and keys
with keys, each with a ring of its own.

The score of a pair itself is in no sweep. With R the sum of exp(score) of all others in its softmax, its term of the loss is
softplus(log R - score), and the gradient by its score -R / (R + exp(score)): both keep their digits where the loss is nearly 0.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise

import torch
import torch.distributed as dist
import torch.nn.functional as F

from bert_fast.compression.compiled import has_triton
from bert_fast.contrastive.embeddings import Pairs, Shares
from bert_fast.contrastive.options import LossOptions
from bert_fast.contrastive.ring import Ring, Shape
from bert_fast.contrastive.scores import BOUND
from bert_fast.contrastive.softmax import Denominators, Weights, weights_of
from bert_fast.contrastive.sweep import Sweep
from bert_fast.contrastive.tile_size import MakeTiles, tile_size
from bert_fast.contrastive.tiles.plain import TorchTiles
from bert_fast.contrastive.tiles.triton_tiles import TritonTiles
from bert_fast.contrastive.tiles.widths import WidthTiles
from bert_fast.contrastive.vectors import Gradient, Vectors, inverse_lengths

_ROWS = 4096  # of embeddings that are copied at a time

# Ways to compute tiles of embeddings as they are, by name
BACKENDS: dict[str, MakeTiles] = {"torch": TorchTiles, "triton": TritonTiles}


def default_backend(device: torch.device, dtype: torch.dtype) -> str:
    """The fastest way to compute tiles on a device."""
    return "triton" if device.type == "cuda" and has_triton() else "torch"


@functools.cache
def maker_of(widths: tuple[int, ...], backend: str) -> MakeTiles:
    """What makes tiles from a scale and whether scores are bounded; the same object for the same arguments."""
    return functools.partial(WidthTiles, widths=widths) if widths else BACKENDS[backend]


class Computation:
    """The loss of one batch and its gradients.

    Args:
        shares: what `embeddings.share` has returned for the pairs.
        tile: rows and columns of a tile; None: what is fastest here.
        backend: a key of `BACKENDS`; None: the device's.
    """

    def __init__(
        self,
        pairs: Pairs,
        shares: Shares,
        options: LossOptions,
        ring: Ring,
        tile: tuple[int, int] | None = None,
        backend: str | None = None,
    ) -> None:
        self._options, self._ring, self._shares, self._scale = options, ring, shares, shares.scale
        # Lengths are of fp32 numbers, and a sum of rounded products may be a little more
        reach = 1.001 * self._scale * (1.0 if options.widths else shares.longest**2)
        self._bounded = reach <= BOUND
        device = pairs.queries.device
        dtype = torch.bfloat16 if options.precision == "bf16" else torch.float32
        make = maker_of(options.widths, backend or default_backend(device, dtype))
        width = pairs.queries.shape[1]
        size = tile or tile_size(make, self._bounded, device, dtype, width, options.widths, max(shares.num_keys))
        self._sweep = Sweep(make(self._scale, self._bounded), size)
        self._positives = (
            torch.arange(len(pairs.queries), device=device) if pairs.positives is None else pairs.positives.to(device)
        )
        self._queries = self._vectors(pairs.queries.to(dtype), pairs.query_ids)
        self._keys = self._vectors(pairs.keys.to(dtype), pairs.key_ids)
        self._scores = self._scores_of_pairs()
        if options.margin is not None:
            limits = self._scores + options.margin * self._scale
            of_keys = limits.new_full((options.num_widths, len(self._keys)), torch.inf)
            of_keys[:, self._positives] = limits
            self._queries, self._keys = replace(self._queries, limits=limits), replace(self._keys, limits=of_keys)
        self._num_widths = options.num_widths
        num_pairs = sum(shares.num_queries)
        self._query_share = (0.5 if options.symmetric else 1.0) / num_pairs
        self._key_share = 0.5 / num_pairs if options.symmetric else 0.0
        # Sums of softmaxes, for each width: of queries; of all keys, and of the pairs' keys with what else is compared
        self._of_queries = self._no_scores(len(self._queries))
        self._of_keys = self._no_scores(len(self._keys))
        self._of_pairs = self._no_scores(len(self._queries))

    # ---- the loss ---------------------------------------------------------------------------------------------------

    def forward(self) -> torch.Tensor:
        """The mean over the pairs of all ranks, fp32 0-dim. A collective."""
        symmetric = self._options.symmetric

        def visit(owner: int, block: Sequence[torch.Tensor]) -> list[torch.Tensor]:
            columns = self._received(block, self._keys)
            of_columns = self._no_scores(len(columns)) if symmetric else None
            self._sweep.forward(self._queries, columns, self._of_queries, of_columns, self._positives_in(owner))
            return [] if of_columns is None else [_packed(of_columns)]

        shapes = [Shape((2 * self._num_widths,), torch.float32)] if symmetric else []
        home = self._ring.circulate(_sent(self._keys), shapes, self._shares.num_keys, visit, _add_sums)
        if symmetric:
            self._of_keys = _unpacked(home[0])
            self._of_pairs = [Denominators(*(x[self._positives] for x in sums)) for sums in self._of_keys]
        for vectors, rows, sums in self._same_side():
            self._compare_same_side(vectors, rows, sums)
        loss = torch.zeros((), dtype=torch.float64, device=self._scores.device)
        for number in range(self._num_widths):
            weight = self._options.weight(number)
            loss += weight * self._query_share * F.softplus(self._rest(self._of_queries, number)).sum()
            if symmetric:
                loss += weight * self._key_share * F.softplus(self._rest(self._of_pairs, number)).sum()
        if self._ring.world > 1:
            dist.all_reduce(loss, group=self._ring.group)
        return loss.float()

    def _compare_same_side(self, vectors: Vectors, rows: Vectors, sums: list[Denominators]) -> None:
        def visit(_owner: int, block: Sequence[torch.Tensor]) -> list[torch.Tensor]:
            self._sweep.forward(rows, self._received(block, vectors), sums, None, None)
            return []

        self._ring.circulate(_sent(vectors), [], self._shares.num_queries, visit, _add)

    def _same_side(self) -> list[tuple[Vectors, Vectors, list[Denominators]]]:
        """Comparisons of queries with queries and of the pairs' keys with each other.

        The vectors, the same as rows with the limits of their softmaxes, and the sums of these.
        """
        compared = []
        if self._options.query_query:
            queries = replace(self._queries, ids=self._ids(self._queries.ids), limits=None)
            compared.append((queries, replace(queries, limits=self._queries.limits), self._of_queries))
        if self._options.key_key:
            keys = self._keys.take(self._positives)
            keys = replace(keys, ids=self._ids(keys.ids))
            sums = self._of_pairs if self._options.symmetric else self._of_queries
            compared.append((replace(keys, limits=None), keys, sums))
        return compared

    def _rest(self, sums: Sequence[Denominators], number: int) -> torch.Tensor:
        """log R - score of every pair, fp64 [b]."""
        maximum, total = sums[number]
        return total.double().log() + (maximum.double() - self._scores[number].double())

    # ---- the gradients ----------------------------------------------------------------------------------------------

    def backward(self, factor: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Gradients of `factor` times the loss by queries, keys and the scale: fp32 [b, d], [k, d], 0-dim. A collective."""
        if self._options.gradients == "mean":
            factor = factor * self._ring.world
        factor = factor * self._scale
        by_queries, by_keys = self._no_gradient(self._queries), self._no_gradient(self._keys)
        query_weights = self._weights(self._of_queries, factor * self._query_share)
        pair_weights = self._weights(self._of_pairs, factor * self._key_share) if self._options.symmetric else None
        self._keys_with_queries(by_queries, by_keys, query_weights, pair_weights)
        for vectors, rows, sums in self._same_side():
            weights = pair_weights if pair_weights is not None and sums is self._of_pairs else query_weights
            of_rows, of_vectors = self._same_side_gradients(vectors, rows, weights)
            of_rows.add(of_vectors)
            if vectors.values is self._queries.values:
                by_queries.add(of_rows)
            else:
                by_keys.add_at(self._positives, of_rows)
        self._pairs_gradients(by_queries, by_keys, factor)
        if self._options.widths:
            sides = [(by_queries, self._queries), (by_keys, self._keys)]
            aligned = [gradient.alignment.double().sum() for gradient, _ in sides if gradient.alignment is not None]
            by_scale = torch.stack(aligned).sum()
            for gradient, vectors in sides:
                self._turn(gradient, vectors)
        else:
            by_scale = _dot(by_queries.values, self._queries.values) + _dot(by_keys.values, self._keys.values)
        return by_queries.values, by_keys.values, by_scale / (2 * self._scale)

    def _keys_with_queries(
        self,
        by_queries: Gradient,
        by_keys: Gradient,
        query_weights: Sequence[Weights],
        pair_weights: Sequence[Weights] | None,
    ) -> None:
        """Of the sweep of keys with queries, added to both gradients."""
        constants = _sent(self._keys)
        if pair_weights is not None:
            key_weights = []
            for sums, weights in zip(self._of_keys, pair_weights, strict=True):
                maximum = torch.zeros_like(sums.maximum) if self._bounded else sums.maximum.clone()
                maximum[self._positives] = weights.maximum
                key_weights.append(
                    Weights(maximum, torch.zeros_like(maximum).index_copy_(0, self._positives, weights.factor))
                )
            constants.append(_packed(key_weights))

        def visit(owner: int, block: Sequence[torch.Tensor]) -> list[torch.Tensor]:
            columns = self._received(block, self._keys)
            of_columns = None if pair_weights is None else [Weights(*pair) for pair in _unpacked(block[-1])]
            into = by_keys if self._ring.world == 1 else self._no_gradient(columns)
            self._sweep.backward(
                self._queries, columns, query_weights, of_columns, self._positives_in(owner), by_queries, into
            )
            return into.tensors()

        home = self._ring.circulate(constants, self._gradient_shapes(), self._shares.num_keys, visit, _add)
        if self._ring.world > 1:
            by_keys.add(Gradient.of(home))

    def _same_side_gradients(
        self, vectors: Vectors, rows: Vectors, weights: Sequence[Weights]
    ) -> tuple[Gradient, Gradient]:
        by_rows = self._no_gradient(vectors)

        def visit(_owner: int, block: Sequence[torch.Tensor]) -> list[torch.Tensor]:
            columns = self._received(block, vectors)
            by_columns = self._no_gradient(columns)
            self._sweep.backward(rows, columns, weights, None, None, by_rows, by_columns)
            return by_columns.tensors()

        shapes = self._gradient_shapes()
        home = self._ring.circulate(_sent(vectors), shapes, self._shares.num_queries, visit, _add)
        return by_rows, Gradient.of(home)

    def _pairs_gradients(self, by_queries: Gradient, by_keys: Gradient, factor: torch.Tensor) -> None:
        """By the scores of the pairs themselves."""
        coefficients = []
        for number in range(self._num_widths):
            by_score = self._query_share * self._rest(self._of_queries, number).sigmoid()
            if self._options.symmetric:
                by_score += self._key_share * self._rest(self._of_pairs, number).sigmoid()
            coefficients.append((by_score * (-factor * self._options.weight(number))).float())
        for start in range(0, len(self._queries), _ROWS):
            rows = slice(start, start + _ROWS)
            keys = self._positives[rows]
            a, b = self._queries.cut(rows), self._keys.take(keys)
            into = self._no_gradient(b)
            if a.inverse is None or b.inverse is None:
                coefficient = coefficients[0][rows, None]
                by_queries.values[rows].add_(b.values * coefficient)
                into.values.copy_(a.values * coefficient)
            else:
                total = torch.zeros_like(coefficients[0][rows])
                for number, (first, last) in reversed(list(enumerate(pairwise((0, *self._options.widths))))):
                    coefficient = coefficients[number][rows]
                    total = total + coefficient * a.inverse[number] * b.inverse[number]
                    by_queries.values[rows, first:last].add_(b.values[:, first:last] * total[:, None])
                    into.values[:, first:last].copy_(a.values[:, first:last] * total[:, None])
                    aligned = coefficient * self._scores[number, rows] / self._scale
                    by_queries.cut(rows).alignment_of(number).add_(aligned)
                    into.alignment_of(number).copy_(aligned)
            by_keys.add_at(keys, into)

    def _turn(self, gradient: Gradient, vectors: Vectors) -> None:
        """Take away the part along each vector, of which a normalized one has none."""
        if vectors.inverse is None:
            return
        total = torch.zeros(len(vectors), device=gradient.values.device)
        for number, (start, stop) in reversed(list(enumerate(pairwise((0, *self._options.widths))))):
            total += gradient.alignment_of(number) * vectors.inverse[number].square()
            gradient.values[:, start:stop].sub_(vectors.values[:, start:stop] * total[:, None])

    # ---- parts ------------------------------------------------------------------------------------------------------

    def _vectors(self, values: torch.Tensor, ids: torch.Tensor | None) -> Vectors:
        values = values.contiguous()
        return Vectors(
            values, None if ids is None else ids.to(values.device), None, inverse_lengths(values, self._options.widths)
        )

    def _ids(self, given: torch.Tensor | None) -> torch.Tensor:
        """Of the queries' side or the pairs' keys: a number for each pair of all ranks, if none are given."""
        if given is not None:
            return given
        first = sum(self._shares.num_queries[: self._ring.rank])
        return torch.arange(first, first + len(self._queries), device=self._scores.device)

    def _scores_of_pairs(self) -> torch.Tensor:
        """fp32 [W, b]."""
        scores = torch.empty(self._options.num_widths, len(self._queries), device=self._queries.values.device)
        for start in range(0, len(self._queries), _ROWS):
            rows = slice(start, start + _ROWS)
            a, b = self._queries.cut(rows), self._keys.take(self._positives[rows])
            products = a.values.float() * b.values.float()
            if a.inverse is None or b.inverse is None:
                scores[0, rows] = products.sum(1)
                continue
            slices = [products[:, first:last].sum(1) for first, last in pairwise((0, *self._options.widths))]
            scores[:, rows] = torch.stack(slices).cumsum(0) * a.inverse * b.inverse
        return scores * self._scale

    def _weights(self, sums: Sequence[Denominators], factor: torch.Tensor) -> list[Weights]:
        return [
            weights_of(each.with_scores(self._scores[number]), factor * self._options.weight(number), self._bounded)
            for number, each in enumerate(sums)
        ]

    def _positives_in(self, owner: int) -> torch.Tensor | None:
        """Pairs' keys are this rank's own."""
        return self._positives if owner == self._ring.rank else None

    def _received(self, block: Sequence[torch.Tensor], like: Vectors) -> Vectors:
        """Vectors of another rank, from what `_sent` has made of them."""
        rest = iter(block)
        values = next(rest)
        ids = None if like.ids is None else next(rest)
        limits = None if like.limits is None else next(rest).t()
        return Vectors(values, ids, limits, inverse_lengths(values, self._options.widths))

    def _no_scores(self, num: int) -> list[Denominators]:
        return [Denominators.empty(num, self._scores.device) for _ in range(self._num_widths)]

    def _no_gradient(self, vectors: Vectors) -> Gradient:
        return Gradient.zeros(vectors.values, len(self._options.widths))

    def _gradient_shapes(self) -> list[Shape]:
        shapes = [Shape((self._queries.values.shape[1],), torch.float32)]
        return [*shapes, Shape((len(self._options.widths),), torch.float32)] if self._options.widths else shapes


def _sent(vectors: Vectors) -> list[torch.Tensor]:
    """What another rank must have of vectors."""
    sent = [vectors.values]
    if vectors.ids is not None:
        sent.append(vectors.ids)
    if vectors.limits is not None:
        sent.append(vectors.limits.t().contiguous())
    return sent


def _packed(pairs: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> torch.Tensor:
    """fp32 [n, 2 W]."""
    return torch.stack([tensor for pair in pairs for tensor in pair], dim=1)


def _unpacked(packed: torch.Tensor) -> list[Denominators]:
    """The inverse of `_packed`."""
    columns = [column.contiguous() for column in packed.unbind(1)]
    return [Denominators(*pair) for pair in zip(columns[::2], columns[1::2], strict=True)]


def _add_sums(totals: Sequence[torch.Tensor], added: Sequence[torch.Tensor]) -> None:
    for total, new in zip(totals, added, strict=True):
        both = _unpacked(total)
        for sums, others in zip(both, _unpacked(new), strict=True):
            sums.add(others)
        total.copy_(_packed(both))


def _add(totals: Sequence[torch.Tensor], added: Sequence[torch.Tensor]) -> None:
    for total, new in zip(totals, added, strict=True):
        total.add_(new)


def _dot(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """The sum of all products, fp64 0-dim. In fp32 the sums' own rounding would be most of the error."""
    total = torch.zeros((), dtype=torch.float64, device=a.device)
    for start in range(0, len(a), _ROWS):
        total += (a[start : start + _ROWS].double() * b[start : start + _ROWS]).sum()
    return total
