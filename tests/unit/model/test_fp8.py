"""FP8 through Transformer Engine: what is replaced and kept, with a stand-in for the package; it needs a GPU to run."""

from __future__ import annotations

import sys
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import nn

from bert_fast.config import Config
from bert_fast.errors import UserError
from bert_fast.model.bert import BertForPretraining
from bert_fast.model.fp8 import check_fp8, use_fp8
from bert_fast.parts import parts_of
from bert_fast.train.batches import synthetic_batch, to_device


@pytest.fixture
def entered(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """A package of the name whose Linear is torch's; the list tells how often its context was entered."""
    calls: list[bool] = []

    class Linear(nn.Linear):
        def __init__(self, inner: int, outer: int, bias: bool, params_dtype: torch.dtype, device: Any) -> None:
            super().__init__(inner, outer, bias=bias, dtype=params_dtype, device=device)

    @contextmanager
    def fp8_autocast(enabled: bool) -> Iterator[None]:
        calls.append(enabled)
        yield

    package, module = types.ModuleType("transformer_engine"), types.ModuleType("transformer_engine.pytorch")
    module.Linear, module.fp8_autocast = Linear, fp8_autocast  # type: ignore[attr-defined]
    package.pytorch = module  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "transformer_engine", package)
    monkeypatch.setitem(sys.modules, "transformer_engine.pytorch", module)
    return calls


def test_names_weights_and_results_stay(make_config: Callable[..., Config], entered: list[bool]) -> None:
    config = make_config()
    torch.manual_seed(0)
    model = BertForPretraining(config.model, "loop")
    batch = to_device(synthetic_batch(4, 32, config.model.vocab_size, 0), torch.device("cpu"))
    before, names = model(batch).mlm_sum, [name for name, _ in model.named_parameters()]
    assert entered == []
    use_fp8(model)
    torch.testing.assert_close(model(batch).mlm_sum, before)
    assert entered == [True]
    assert [name for name, _ in model.named_parameters()] == names
    assert type(model.layers[0].qkv).__name__ == "Linear"
    assert all(len(parts_of(p)) == 3 for layer in model.layers for p in layer.qkv.parameters())
    assert type(model.layers[1].down).__name__ == "Fp8GeluLinear"


def test_what_it_needs_is_said(make_config: Callable[..., Config], entered: list[bool]) -> None:
    with pytest.raises(UserError, match="train.precision=fp8 needs CUDA"):
        check_fp8(torch.device("cpu"), 64)
    with pytest.raises(UserError, match="batch.shape_multiple=8; set it to 64"):
        check_fp8(torch.device("cuda"), 8)
    check_fp8(torch.device("cuda"), 64)
    with pytest.raises(UserError, match="train.precision=fp8 needs CUDA; on CPU set"):
        make_config("train.precision=fp8")
    make_config("train.precision=fp8", "system.device=cuda")
    with pytest.raises(UserError, match=r"model\.last_layer=predicted with .*fp8.* set model\.last_layer=all"):
        make_config("train.precision=fp8", "system.device=cuda", "model.last_layer=predicted")


def test_a_missing_package_says_how_to_get_it() -> None:
    with pytest.raises(UserError, match="transformer-engine is not installed"):
        check_fp8(torch.device("cuda"), 64)
