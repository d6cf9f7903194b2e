"""What a contrastive loss compares with what, and how it is computed."""

from __future__ import annotations

import math
from dataclasses import dataclass

from bert_fast.errors import UserError

PRECISIONS = ("fp32", "bf16")
GRADIENTS = ("mean", "sum")


@dataclass(frozen=True)
class LossOptions:
    """Which scores are in which softmax.

    symmetric:   whether each key also chooses its query, at half the weight; else queries choose keys alone
    query_query: whether other queries are negatives of a query
    key_key:     whether other queries' positives are negatives of a query's positive. They are in that key's softmax if
                 `symmetric`, else in its query's (as Qwen3-Embedding has them, arXiv 2506.05176, section 3)
    margin:      a score above that of the anchor's positive by more than `margin * scale` does not count: it is likely to be a
                 positive that nobody has marked; None: all count
    widths:      Matryoshka (Kusupati et al., arXiv 2205.13147): the loss of the first so many numbers of each embedding,
                 normalized, for each of these widths; empty: of the embeddings as they are, which are not normalized here
    weights:     of `widths` in the loss; empty: 1 each
    precision:   of the operands of matrix products, `fp32` or `bf16`; sums are fp32
    gradients:   `sum`: a rank's gradient is its share of the global loss's, which is the sum over ranks; `mean`: that times the
                 number of ranks, so that the mean over ranks, which DistributedDataParallel takes, is the global one
    """

    symmetric: bool = True
    query_query: bool = False
    key_key: bool = False
    margin: float | None = None
    widths: tuple[int, ...] = ()
    weights: tuple[float, ...] = ()
    precision: str = "fp32"
    gradients: str = "mean"

    def __post_init__(self) -> None:
        """Raises UserError for options that contradict each other."""
        if self.margin is not None and not (math.isfinite(self.margin) and self.margin >= 0):
            raise UserError(f"contrastive margin {self.margin}: a finite number from 0, or none")
        if list(self.widths) != sorted(set(self.widths)) or any(width < 1 for width in self.widths):
            raise UserError(f"contrastive widths {list(self.widths)}: whole numbers from 1 that ascend")
        if self.weights and len(self.weights) != len(self.widths):
            raise UserError(f"contrastive weights {list(self.weights)}: one for each of {len(self.widths)} widths")
        if any(not (math.isfinite(weight) and weight > 0) for weight in self.weights):
            raise UserError(f"contrastive weights {list(self.weights)}: finite numbers above 0")
        if self.precision not in PRECISIONS:
            raise UserError(f"contrastive precision {self.precision!r}: one of {', '.join(PRECISIONS)}")
        if self.gradients not in GRADIENTS:
            raise UserError(f"contrastive gradients {self.gradients!r}: one of {', '.join(GRADIENTS)}")

    @property
    def num_widths(self) -> int:
        """Losses that are summed."""
        return max(1, len(self.widths))

    def weight(self, number: int) -> float:
        """Of a width."""
        return self.weights[number] if self.weights else 1.0


def check_scale(scale: float) -> None:
    """Raises UserError for a scale (1 / temperature) that no softmax can have."""
    if not (math.isfinite(scale) and scale > 0):
        raise UserError(f"contrastive scale {scale} (1 / temperature): a finite number above 0; 20 to 100 are usual")
