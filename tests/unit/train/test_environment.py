"""Device, precision and random numbers of a rank."""

from __future__ import annotations

import pytest
import torch
from support.steps import CPU, cpu_rank

from bert_fast.errors import UserError
from bert_fast.train.environment import pick_device, pick_dtype, seed_ranks


def test_precision_and_device_of_a_cpu() -> None:
    assert pick_dtype("fp32", CPU) == torch.float32
    assert pick_dtype("bf16", CPU) == torch.bfloat16
    assert pick_dtype("auto", CPU) in (torch.float32, torch.bfloat16)
    with pytest.raises(UserError, match=r"precision=fp16 needs CUDA; on CPU set"):
        pick_dtype("fp16", CPU)
    assert pick_device("cpu", 0) == CPU


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_cuda_that_is_not_there_says_the_mend() -> None:
    assert pick_device("auto", 0) == CPU
    with pytest.raises(UserError, match=r"no usable CUDA device; set system\.device=cpu"):
        pick_device("cuda", 0)


@pytest.mark.parametrize("seed", [0, 179_999_999_999_999, 1_795_651_200_123_456_789, 2**63 - 1])
def test_every_seed_of_the_config_seeds_ranks_apart(seed: int) -> None:
    drawn = []
    for rank in (0, 1):
        seed_ranks(seed, cpu_rank(rank, 2))
        drawn.append(torch.rand(4))
    assert not torch.equal(*drawn)
