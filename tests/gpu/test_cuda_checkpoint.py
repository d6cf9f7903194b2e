"""On a CUDA device: a checkpoint copied beside the next step is that of the step before, and comes back to the bit."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from bert_fast.config import Config
from bert_fast.train.checkpoint.async_writer import AsyncCheckpointWriter
from bert_fast.train.checkpoint.snapshot import load_tensors, optimizer_counts, rank_state, slices_to_write
from bert_fast.train.environment import Environment
from bert_fast.train.setup.build import build
from bert_fast.train.setup.warmup import synthetic_input

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]


@pytest.mark.parametrize("optimizer", ["adamw", "lamb"])
def test_a_checkpoint_beside_the_next_step(make_config: Callable[..., Config], tmp_path: Path, optimizer: str) -> None:
    device = torch.device("cuda", torch.cuda.current_device())
    environment = Environment(0, 0, 1, device, torch.float32)
    dropout = ("model.hidden_dropout=0.1", "model.attention_dropout=0.0", "system.device=cuda")
    config = make_config(f"optimizer.name={optimizer}", *dropout)
    components = build(config, environment)
    saver = AsyncCheckpointWriter(tmp_path, environment, 2, None)

    def steps(first: int) -> list[float]:
        return [
            components.step(synthetic_input(config, environment, first + i), 0.01, saver.before_update).mlm_sum.item()
            for i in (0, 1)
        ]

    steps(0)
    counts = json.loads(json.dumps(optimizer_counts(components)))
    saver.start(slices_to_write(components, environment), rank_state(components, environment), {"step": 2})
    expected = steps(2)  # while it is copied and written
    saver.wait()
    components = build(config, environment)
    load_tensors(tmp_path / "step-00000002", components, environment, counts, num_ranks=1)
    assert steps(2) == expected
