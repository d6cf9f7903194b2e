"""The strategies that are compared."""

from __future__ import annotations

from typing import get_args

from bert_fast.config import BalanceConfig

STRATEGIES: tuple[str, ...] = get_args(BalanceConfig.model_fields["strategy"].annotation)
