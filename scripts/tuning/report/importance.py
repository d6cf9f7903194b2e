"""How much each setting of a space has mattered, by PED-ANOVA (Watanabe et al., arXiv 2304.10255), as Optuna computes it."""

from __future__ import annotations

import math
import warnings

from .loading import COMPLETE, DIVERGED, CellTrials, import_optuna

MIN_TRIALS = 8
TOP_SHARE = 0.25  # of the trials: the good ones, whose settings are compared with those of all


def importance_of(cell: CellTrials) -> dict[str, float] | None:
    """The share of each setting, together 1; None with fewer than 8 complete trials, or where the values tell nothing."""
    if cell.optuna_study is None or cell.count(COMPLETE, DIVERGED) < MIN_TRIALS:
        return None
    values = {trial.value for trial in cell.trials if trial.state in (COMPLETE, DIVERGED)}
    if len(values) == 1:  # no trial was better than another
        return None
    optuna = import_optuna()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that it is experimental, and that a setting did not vary
        found = optuna.importance.get_param_importances(
            cell.optuna_study, evaluator=optuna.importance.PedAnovaImportanceEvaluator(target_quantile=TOP_SHARE)
        )
    shares = {name: float(share) for name, share in found.items()}
    return shares if all(map(math.isfinite, shares.values())) and sum(shares.values()) > 0 else None
