"""Whether two sets of runs on the same seeds differ: a paired test that assumes no distribution."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean

import numpy as np

MAX_EXACT = 16  # seeds, whose 2^16 assignments of signs are all looked at; with more, a t-test


@dataclass(frozen=True)
class Comparison:
    """Runs against those of a reference with the same seeds.

    n:     common seeds
    ratio: of the means over the common seeds
    p:     two-sided; None with a single seed, of which no test can be made
    """

    n: int
    ratio: float
    p: float | None


def compare(values: Mapping[int, float], reference: Mapping[int, float]) -> Comparison | None:
    """Compare values by seed with those of a reference; None if there is no common seed."""
    seeds = sorted(values.keys() & reference.keys())
    if not seeds:
        return None
    ours, theirs = [values[seed] for seed in seeds], [reference[seed] for seed in seeds]
    p = paired_p([a - b for a, b in zip(ours, theirs, strict=True)]) if len(seeds) > 1 else None
    return Comparison(len(seeds), fmean(ours) / fmean(theirs), p)


def paired_p(differences: Sequence[float]) -> float:
    """The two-sided p value of paired differences: by signs up to 16 of them, by Student's t above."""
    if len(differences) <= MAX_EXACT:
        return sign_flip_p(differences)
    from scipy.stats import ttest_1samp

    if len(set(differences)) == 1:
        return 0.0 if differences[0] else 1.0
    return float(ttest_1samp(differences, 0.0).pvalue)


def sign_flip_p(differences: Sequence[float]) -> float:
    """The exact two-sided p value of Fisher's randomization test (The Design of Experiments, 1935, section 21).

    If the two sides do not differ, each difference could as well have had the other sign. p is the share of the 2^n
    assignments of signs whose sum is at least as far from 0 as the observed one; it is never below 2^(1-n).

    Args:
        differences: 1 to 16 of them.

    Raises:
        ValueError: there are none, or too many for all assignments.
    """
    count = len(differences)
    if not 1 <= count <= MAX_EXACT:
        raise ValueError(f"the test takes 1 to {MAX_EXACT} differences, not {count}")
    sizes = np.asarray(differences, dtype=np.float64)
    signs = 1 - 2 * ((np.arange(2**count)[:, None] >> np.arange(count)) & 1)
    sums = np.abs(signs @ sizes)
    rounding = 1e-12 * float(np.abs(sizes).sum())  # sums that are equal in exact arithmetic count as equal
    return float(np.mean(sums >= abs(float(sizes.sum())) - rounding))
