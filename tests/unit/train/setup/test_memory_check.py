"""What cannot fit a machine is refused with one line before anything is built."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from bert_fast.config import Config
from bert_fast.errors import UserError
from bert_fast.memory.estimate import least_bytes
from bert_fast.memory.state import num_parameters
from bert_fast.train.environment import Environment
from bert_fast.train.setup import build
from bert_fast.train.setup.inputs import check_room


def test_the_largest_model_is_refused_before_it_is_built(
    make_config: Callable[..., Config], environment: Environment, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = make_config("model.hidden_size=65536", "model.num_layers=1024", "model.vocab_size=1048576")
    monkeypatch.setattr(build, "BertForPretraining", lambda *_: pytest.fail("it was built"))
    with pytest.raises(UserError, match=r"model\.vocab_size=1048576, hidden_size=65536.* need at least [\d,.]+ GiB"):
        build.build_model(config, environment)


def test_ranks_share_the_machine(make_config: Callable[..., Config], monkeypatch: pytest.MonkeyPatch) -> None:
    config = make_config()
    monkeypatch.setattr(build, "machine_memory", lambda: 3 * least_bytes(config))
    build.check_memory(config, torch.device("cpu"))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    with pytest.raises(UserError, match=r"for 4 rank\(s\)"):
        build.check_memory(config, torch.device("cpu"))


def test_least_bytes_are_fewer_than_a_run_needs(make_config: Callable[..., Config]) -> None:
    config = make_config()
    assert 16 * num_parameters(config.model) < least_bytes(config)
    larger = make_config("batch.micro_batch_size=8192", "batch.global_batch_size=8192")
    assert least_bytes(larger) > least_bytes(config)


def test_more_processes_than_memory_holds(make_config: Callable[..., Config]) -> None:
    config = make_config("system.world_size=131072", "batch.micro_batch_size=1", "batch.global_batch_size=131072")
    with pytest.raises(UserError, match=r"system\.world_size=131072 processes here need at least"):
        check_room(config)


def test_a_window_of_gradients_that_cannot_fit_is_refused_with_its_size(
    make_config: Callable[..., Config], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(build, "machine_memory", lambda: 64 << 20)
    build.check_memory(make_config("optimizer.name=mfac", "optimizer.window=16"), torch.device("cpu"))
    with pytest.raises(
        UserError, match=r"optimizer\.window=65536 gradients of optimizer\.name=mfac take [\d,.]+ GiB.*smaller"
    ):
        build.check_memory(make_config("optimizer.name=mfac", "optimizer.window=65536"), torch.device("cpu"))
