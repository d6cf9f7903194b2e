"""The paper's strategy (arXiv 2402.02447): a fixed number of samples of each length stratum, sorted within each node."""

from __future__ import annotations

import numpy as np

from bert_fast.balance import assign
from bert_fast.balance.strata import Strata
from bert_fast.balance.strategies.base import EqualCounts, StepSamples, StepShape
from bert_fast.config import BalanceConfig


class StratifiedPresort(EqualCounts):
    """Draws rank by rank, so that the samples of a step depend on the number of ranks; they never leave their node."""

    def __init__(self, config: BalanceConfig, shape: StepShape, lengths: np.ndarray, seed: int) -> None:
        """Reads all `lengths` once."""
        super().__init__(config, shape, lengths, seed)
        counts = None if config.strata_counts is None else np.array(config.strata_counts)
        bounds = _bounds(config, shape.max_seq_len)
        self._strata = Strata(lengths, bounds, counts, shape.samples_per_rank, shape.num_ranks, seed)

    def draw(self, step: int) -> np.ndarray:
        return self._strata.draw(step)

    def to_ranks(self, samples: StepSamples) -> np.ndarray:
        num_ranks, node_size = self.shape.num_ranks, self.shape.ranks_per_node
        ranks = assign.node_snake(samples.costs, num_ranks, node_size)
        nodes = ranks.reshape(num_ranks // node_size, node_size, -1)
        labels = samples.rng.permuted(
            np.tile(np.arange(node_size), (len(nodes), 1)), axis=1
        )  # ranks stay on their node
        return np.take_along_axis(nodes, labels[:, :, None], axis=1).reshape(num_ranks, -1)


def _bounds(config: BalanceConfig, max_seq_len: int) -> np.ndarray:
    """Upper length bounds of the strata."""
    if config.strata is not None:
        return np.array(config.strata)
    return np.arange(1, config.num_strata + 1) * max_seq_len // config.num_strata
