"""Schedule-free AdamW (Defazio et al., arXiv 2405.15682). The one place that imports the package schedulefree.

Gradients are taken at y, which is what the model's parameters are while it trains; x, the average of the iterates z, is
evaluated and exported. y = (1 - beta1) z + beta1 x, so that a checkpoint of y and z has all three.
"""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn

from bert_fast.config import OptimizerConfig
from bert_fast.errors import UserError
from bert_fast.optim.adamw import adam_settings
from bert_fast.optim.build import RunOptimizer, decay_groups, missing_package


def build(named_parameters: Iterable[tuple[str, nn.Parameter]], config: OptimizerConfig) -> RunOptimizer:
    """The package's optimizer, without its own warm-up: the config's schedule gives the rate.

    Raises:
        UserError: the package is not installed, or beta1 is 0, where x cannot be computed from y and z.
    """
    if config.beta1 == 0:
        raise UserError(
            "optimizer.name=schedule_free with optimizer.beta1=0: the weights to evaluate cannot be told from those that are "
            "trained; set beta1 above 0, to 0.9 for example"
        )
    try:
        from schedulefree import AdamWScheduleFree
    except ImportError:
        raise missing_package("schedule_free") from None

    class ScheduleFree(AdamWScheduleFree, RunOptimizer):  # type: ignore[misc]
        state_names = ("z", "exp_avg_sq")
        group_state_names = ("k", "weight_sum", "lr_max")
        evaluates_other_weights = True

        def write_evaluated_weights(self) -> None:
            self.eval()  # y becomes x in place
            _stay_in_training(self)  # whoever called this puts y back, without a rounding

    groups = decay_groups(named_parameters, config.weight_decay)
    optimizer = ScheduleFree(groups, **adam_settings(config))
    _stay_in_training(optimizer)
    return optimizer


def _stay_in_training(optimizer: RunOptimizer) -> None:
    """Tell the package that the parameters are y."""
    for group in optimizer.param_groups:
        group["train_mode"] = True
