"""What a run minimises: which model is built, and how its losses become the number that backward starts from."""

from __future__ import annotations

from typing import Any, Protocol

import torch

from bert_fast.config import ModelConfig
from bert_fast.model.bert import BertForPretraining


class Objective(Protocol):
    """An entry of `OBJECTIVES` in config/choices.py (config `train.objective`): a class without arguments."""

    def build_model(self, config: ModelConfig, attention_backend: str) -> BertForPretraining:
        """The model (a subclass may have other heads), on the current default device.

        Its output must have `mlm_sum`, `nsp_sum` and `total`, 0-dim sums over a micro-batch, as `LossSums` has them. `nsp_sum`
        is None where next sentences are not predicted.
        """

    def loss(self, output: Any, global_masked: int | torch.Tensor, global_samples: int | torch.Tensor) -> torch.Tensor:
        """This micro-batch's share of the global mean loss, 0-dim.

        Args:
            output: what the model returned for the micro-batch.
            global_masked, global_samples: masked tokens and samples of the global batch.
        """


class MlmNsp:
    """BERT's objective: masked-token prediction per masked token plus next-sentence prediction per sample.

    A model without next-sentence prediction (`model.next_sentence: false`) has the first alone.
    """

    def build_model(self, config: ModelConfig, attention_backend: str) -> BertForPretraining:
        return BertForPretraining(config, attention_backend)

    def loss(self, output: Any, global_masked: int | torch.Tensor, global_samples: int | torch.Tensor) -> torch.Tensor:
        loss: torch.Tensor = output.mlm_sum / global_masked
        return loss if output.nsp_sum is None else loss + output.nsp_sum / global_samples
