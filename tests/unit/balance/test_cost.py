"""The cost model: formula, whole-number table, fit to times, files."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from bert_fast.balance.cost import CostModel, cost_record, fit_cost, read_cost
from bert_fast.errors import UserError


def test_cost_model_is_the_formula() -> None:
    lengths = np.array([1, 2, 512], np.uint16)  # 512 squared does not fit 16 bits
    np.testing.assert_allclose(CostModel(3.0, 0.5)(lengths), [3.5, 8.0, 3 * 512 + 0.5 * 512**2], rtol=0)


def test_table_is_the_cost_in_whole_numbers() -> None:
    cost = CostModel(613.7e6, 98304)
    table, unit = cost.table(512)
    assert table.dtype == np.int64
    assert table[0] == 0
    assert (np.diff(table) > 0).all()
    np.testing.assert_allclose(table * unit, cost(np.arange(513)), rtol=0, atol=unit)


def measurements(count: int, noise: float, seed: int = 0) -> np.ndarray:
    """Batches of different size and length; 3 ms + 0.02 ms a token + 0.015 us a squared token."""
    rng = np.random.default_rng(seed)
    tokens = rng.uniform(1000, 5000, count)
    squared = tokens * rng.uniform(60, 400, count)
    times = (3 + 0.02 * tokens + 1.5e-5 * squared) * (1 + noise * rng.standard_normal(count))
    return np.column_stack([tokens, squared, times])


def test_fit_finds_what_made_the_times() -> None:
    fit = fit_cost(measurements(12, noise=0.0))
    assert (fit.linear, fit.quadratic, fit.fixed) == pytest.approx((0.02, 1.5e-5, 3), rel=1e-6)
    assert fit.rows == 12
    assert fit.model == CostModel(fit.linear, fit.quadratic)


def test_fit_is_robust_to_disturbed_measurements() -> None:
    """A tenth of the times are three times too long; plain least squares would be far off."""
    rows = measurements(200, noise=0.01)
    rows[:20, 2] *= 3
    fit = fit_cost(rows)
    assert fit.linear == pytest.approx(0.02, rel=0.02)
    assert fit.quadratic == pytest.approx(1.5e-5, rel=0.1)
    assert fit.residual < 0.02
    plain = np.linalg.lstsq(np.column_stack([np.ones(200), rows[:, :2]]), rows[:, 2], rcond=None)[0]
    assert abs(plain[1] / 0.02 - 1) > 0.05


def test_fit_has_no_negative_coefficient() -> None:
    rows = measurements(100, noise=0.02)
    rows[:, 2] = 0.02 * rows[:, 0] - 1e-6 * rows[:, 1]
    fit = fit_cost(rows)
    assert min(fit.fixed, fit.linear, fit.quadratic) >= 0


def test_fit_refuses_what_says_nothing() -> None:
    with pytest.raises(ValueError, match="7 measurements are too few"):
        fit_cost(measurements(7, noise=0.0))
    with pytest.raises(ValueError, match="do not grow with the number of tokens"):
        fit_cost(np.column_stack([np.linspace(1000, 2000, 20), np.linspace(1e5, 2e5, 20), np.linspace(9, 4, 20)]))
    alike = measurements(40, noise=0.05)
    alike[:, 1] = 150 * alike[:, 0]  # every batch has the same mix of lengths
    with pytest.raises(ValueError, match="too much alike"):
        fit_cost(alike)


def test_doubt_is_about_the_error() -> None:
    """Of the price of a token in a long sample over that in a short one; noisy fits are refused for it."""
    true, within, refused = (0.02 + 1.5e-5 * 230) / (0.02 + 1.5e-5 * 230 / 4), 0, 0
    for seed in range(40):
        fit = fit_cost(measurements(30, noise=0.1, seed=seed), most_doubt=np.inf)
        ratio = (fit.linear + fit.quadratic * 230) / (fit.linear + fit.quadratic * 230 / 4)
        within += abs(ratio - true) <= 2.5 * fit.doubt
        try:
            fit_cost(measurements(12, noise=0.3, seed=seed))
        except ValueError:
            refused += 1
    assert within >= 34
    assert refused >= 32


def test_cost_file_holds_the_fit_or_else_the_plan(tmp_path: Path) -> None:
    path = tmp_path / "cost.json"
    fit = fit_cost(measurements(20, noise=0.0))
    path.write_text(json.dumps(cost_record(CostModel(2.0, 0.5), "config", fit)))
    assert read_cost(path) == fit.model
    path.write_text(json.dumps(cost_record(CostModel(2.0, 0.5), "config", None)))
    assert read_cost(path) == CostModel(2.0, 0.5)


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("no json", "is not JSON.*give the cost.json of a finished run"),
        ("[1, 2]", "no JSON object but a list"),
        ('{"fitted": null}', "holds no cost model"),
        ('{"fitted": {"linear": "x", "quadratic": 1}}', r"fitted\.linear: .*valid number.*'x'"),
        ('{"fitted": {"linear": -1, "quadratic": 1}}', r"fitted\.linear: .*greater than or equal to 0"),
        ('{"fitted": {"linear": 0, "quadratic": 0}}', "both costs are 0"),
        ('{"fitted": {"linear": 1}}', "fitted.quadratic is missing"),
        ('{"fitted": [1, 2]}', "fitted: "),
        ('{"fitted": {"linear": NaN, "quadratic": 1}}', "finite number"),
        ("[" * 100_000, "nests too deeply"),
        (" " * (2 << 20), "larger than"),
    ],
)
def test_bad_cost_file_gets_one_line(tmp_path: Path, text: str, why: str) -> None:
    path = tmp_path / "cost.json"
    path.write_text(text)
    with pytest.raises(UserError, match=why):
        read_cost(path)


def test_missing_cost_file_gets_one_line(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"balance\.cost .*No such file.*give the cost\.json of a finished run"):
        read_cost(tmp_path / "cost.json")
