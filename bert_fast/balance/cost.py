"""What a sample costs: cost(L) = a L + b L^2, from FLOPs or fitted to measured times, and how unevenly a plan spreads it."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import BaseModel, ConfigDict

from bert_fast.config.section import Cost
from bert_fast.config.yaml_files import validate
from bert_fast.errors import UserError
from bert_fast.files import read_json
from bert_fast.run_folder import COST

_FILE_BYTES = 1 << 20
_RESOLUTION = 2**30  # the costliest sample in whole numbers: sums of 2^32 samples fit 64 bits


@dataclass(frozen=True)
class CostModel:
    """`linear` per token and `quadratic` per squared token, in any common unit (FLOPs, milliseconds)."""

    linear: float
    quadratic: float

    def __call__(self, lengths: np.ndarray) -> np.ndarray:
        """Cost of samples of these lengths, float64, same shape."""
        lengths = lengths.astype(np.float64)
        return lengths * (self.linear + self.quadratic * lengths)

    def table(self, max_seq_len: int) -> tuple[np.ndarray, float]:
        """Costs of lengths 0 ... max_seq_len as whole numbers (int64), and the unit of one.

        Their sums are the same in any order of adding, so all processors find the same plan.
        """
        costs = self(np.arange(max_seq_len + 1))
        unit = float(costs[-1]) / _RESOLUTION
        return np.rint(costs / unit).astype(np.int64), unit


@dataclass(frozen=True)
class CostFit:
    """A cost model fitted to times, in milliseconds.

    `fixed` is what a measurement takes beside its samples; `residual` the median absolute error over the median time;
    `doubt` the standard error of how much more a token of a long sample costs than one of a short sample; `rows` the number
    of measurements.
    """

    linear: float
    quadratic: float
    fixed: float
    residual: float
    doubt: float
    rows: int

    @property
    def model(self) -> CostModel:
        return CostModel(self.linear, self.quadratic)


def fit_cost(rows: np.ndarray, most_doubt: float = 0.1) -> CostFit:
    """Fit milliseconds = fixed + linear * tokens + quadratic * tokens_squared with no negative coefficient.

    Robust: see `_robust_nnls`. Batches that are all alike say nothing about the terms; such a fit is refused.

    Args:
        rows: [n, 3], of each measurement: sum of L, sum of L^2 over its samples, milliseconds of forward and backward.
        most_doubt: refuse a fit of more doubt than this.

    Raises:
        ValueError: fewer than eight measurements, or such as do not tell the terms apart.
    """
    rows = np.asarray(rows, np.float64).reshape(-1, 3)
    if len(rows) < 8:
        raise ValueError(f"{len(rows)} measurements are too few to fit a cost model; at least 8 are needed")
    coefficients, weights = _robust_nnls(rows)
    fixed, linear, quadratic = coefficients.tolist()
    if (rows[:, :2] @ [linear, quadratic]).sum() < 1e-3 * rows[:, 2].sum():
        raise ValueError(
            "the measured times do not grow with the number of tokens; measure batches of different lengths"
        )
    doubt = _doubt(rows, coefficients, weights)
    if not doubt <= most_doubt:
        raise ValueError(
            "the measured batches are too much alike to tell the cost of a token from that of attention; measure batches "
            "of different lengths (balance.cost=measure)"
        )
    errors = rows[:, 2] - _columns(rows) @ coefficients
    return CostFit(linear, quadratic, fixed, float(np.median(np.abs(errors)) / np.median(rows[:, 2])), doubt, len(rows))


def _columns(rows: np.ndarray) -> np.ndarray:
    return np.column_stack([np.ones(len(rows)), rows[:, :2]])


def _robust_nnls(rows: np.ndarray, iterations: int = 20) -> tuple[np.ndarray, np.ndarray]:
    """(fixed, linear, quadratic) and the weights of rows: iteratively re-weighted non-negative least squares.

    Weights are Tukey's biweight: a measurement that another process disturbed has little, and one far off none.
    """
    from scipy.optimize import nnls

    columns, times = _columns(rows), rows[:, 2]
    scale = np.linalg.norm(columns, axis=0)
    columns = columns / scale
    weights, coefficients = np.ones(len(times)), np.zeros(columns.shape[1])
    for _ in range(iterations):
        root = np.sqrt(weights)
        coefficients, _ = nnls(columns * root[:, None], times * root)
        errors = times - columns @ coefficients
        spread = 1.4826 * float(np.median(np.abs(errors)))
        if spread <= 1e-9 * float(np.median(times)):
            break
        weights = (1 - np.clip(np.abs(errors) / (4.685 * spread), 0, 1) ** 2) ** 2
    return coefficients / scale, weights


def _doubt(rows: np.ndarray, coefficients: np.ndarray, weights: np.ndarray) -> float:
    """Standard error of the price of a token in a long sample over that in one of a quarter of its length.

    From the covariance of the fit without bounds: a coefficient at its bound of zero is no better known than another.
    """
    long = float(rows[:, 1].sum() / rows[:, 0].sum())  # the length of the sample that a token is in, on average
    _, linear, quadratic = coefficients.tolist()
    above, below = linear + quadratic * long, linear + quadratic * long / 4
    slope = np.array([0.0, (below - above) / below**2, (long * below - long / 4 * above) / below**2])
    columns = _columns(rows)
    scale = np.linalg.norm(columns, axis=0)
    normal = (columns / scale).T @ ((columns / scale) * weights[:, None])
    if np.linalg.cond(normal) > 1e14:
        return float("inf")
    errors = rows[:, 2] - columns @ coefficients
    variance = (1.4826 * float(np.median(np.abs(errors)))) ** 2 * len(rows) / max(1.0, weights.sum() - 3)
    slope = slope / scale
    return float(np.sqrt(variance * slope @ np.linalg.solve(normal, slope)))


def cost_record(model: CostModel, source: str, fitted: CostFit | None) -> dict[str, Any]:
    """What `cost.json` of a run says: the model that planned it, where that is from, and what its own times say."""
    return {
        "planned_with": {**asdict(model), "source": source},
        "fitted": None if fitted is None else {**asdict(fitted), "unit": "milliseconds"},
    }


class _Terms(BaseModel):
    """The part of a cost file that is read; what else a run records there is left alone."""

    model_config = ConfigDict(frozen=True)
    linear: Cost
    quadratic: Cost


class _CostFile(BaseModel):
    model_config = ConfigDict(frozen=True)
    planned_with: _Terms | None = None
    fitted: _Terms | None = None


def read_cost(path: str | Path) -> CostModel:
    """The fitted cost model in a `cost.json`, or the one that planned the run if none could be fitted.

    Raises:
        UserError: no such file, or it holds no cost model.
    """
    what = "balance.cost"
    try:
        record = validate(_CostFile, read_json(path, what, _FILE_BYTES), f"{what} {path}")
    except UserError as error:
        raise UserError(f"{error}; give the {COST} of a finished run") from None
    found = record.fitted or record.planned_with
    if found is None:
        raise UserError(f"{what} {path} holds no cost model; give the {COST} of a finished run")
    if found.linear == found.quadratic == 0:
        raise UserError(f"{what} {path}: both costs are 0; at least one must be positive")
    return CostModel(found.linear, found.quadratic)


def imbalance(rank_costs: np.ndarray) -> float:
    """Max over ranks of the cost divided by the mean over ranks; 1.0 is perfect."""
    return float(rank_costs.max() / rank_costs.mean())
