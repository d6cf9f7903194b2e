"""AdamW of the package torchao, with moments in 8 or 4 bits or in FP8. The one place that imports this package.

torchao keeps moments in tensors of its own kind, rounded to the nearest of a table of numbers, with a scale for each block of
256 (4 bits: 128). Those of a tensor of less than 4,096 numbers, or whose size is no multiple of the block, stay in fp32. It
compiles a step for each shape of tensor, which takes from seconds to minutes in the first step of a process.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn

from bert_fast.command import one_line
from bert_fast.config import OptimizerConfig
from bert_fast.errors import UserError
from bert_fast.optim.adamw import adam_settings
from bert_fast.optim.build import RunOptimizer, decay_groups, missing_package

CLASSES = ("AdamW8bit", "AdamW4bit", "AdamWFp8")


def build(named_parameters: Iterable[tuple[str, nn.Parameter]], config: OptimizerConfig) -> RunOptimizer:
    """The class `config.class_name` of the package, in the groups of `decay_groups`.

    Raises:
        UserError: the package is not installed, or the class is none of `CLASSES`.
    """
    if config.class_name not in CLASSES:
        raise UserError(
            f"optimizer.class_name={one_line(config.class_name or '', 80)}: of torchao these can train here: "
            f"{', '.join(CLASSES)}; set one of them"
        )
    try:
        from torchao import optim
    except ImportError:
        raise missing_package("torchao") from None
    kind: Any = getattr(optim, config.class_name)

    class Torchao(kind, RunOptimizer):  # type: ignore[misc]
        has_opaque_state = True

        def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
            """One update, with rates as tensors, as torchao wants them; they are numbers for everyone else."""
            rates = [float(group["lr"]) for group in self.param_groups]
            for group, rate in zip(self.param_groups, rates, strict=True):
                group["lr"] = torch.tensor(rate)
            try:
                super().step(closure)
            finally:
                for group, rate in zip(self.param_groups, rates, strict=True):
                    group["lr"] = rate

    optimizer: Any = Torchao(decay_groups(named_parameters, config.weight_decay), **adam_settings(config))
    for group in optimizer.param_groups:
        group["lr"] = config.lr
    made: RunOptimizer = optimizer
    return made
