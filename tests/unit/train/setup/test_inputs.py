"""What a config names is looked for before ranks are started."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from bert_fast.config import Config
from bert_fast.errors import UserError
from bert_fast.train.setup.inputs import check_inputs


def test_missing_data_and_checkpoint_are_named_before_ranks_start(
    make_config: Callable[..., Config], tmp_path: Path
) -> None:
    check_inputs(make_config())
    with pytest.raises(UserError, match=r"no data at nowhere/eval \(evaluation\.data\); make it with"):
        check_inputs(make_config("evaluation.data=nowhere/eval"))
    with pytest.raises(UserError, match=r"checkpoint\.init_from=.* is neither a folder with model\.safetensors nor"):
        check_inputs(make_config(f"checkpoint.init_from={tmp_path}"))


def test_a_folder_above_the_one_that_is_meant_is_answered_with_it(
    make_config: Callable[..., Config], tmp_path: Path
) -> None:
    parent = Path(make_config().data.train).parent
    with pytest.raises(UserError, match=rf"set data\.train={parent}/train$"):
        check_inputs(make_config(f"data.train={parent}"))
    with pytest.raises(UserError, match=rf"set evaluation\.data={parent}/eval$"):
        check_inputs(make_config(f"evaluation.data={parent}"))
    (tmp_path / "above/model").mkdir(parents=True)
    (tmp_path / "above/model/model.safetensors").touch()
    (tmp_path / "google").mkdir()
    (tmp_path / "google/model.ckpt-7.index").touch()
    for folder, found in (("above", "above/model"), ("google", r"google/model\.ckpt-7")):
        with pytest.raises(UserError, match=rf"set checkpoint\.init_from={tmp_path}/{found}$"):
            check_inputs(make_config(f"checkpoint.init_from={tmp_path / folder}"))


def test_a_pickle_is_not_taken_for_a_checkpoint(make_config: Callable[..., Config], tmp_path: Path) -> None:
    (tmp_path / "old").mkdir()
    (tmp_path / "old/pytorch_model.bin").touch()
    with pytest.raises(UserError, match=r"pytorch_model\.bin is not read"):
        check_inputs(make_config(f"checkpoint.init_from={tmp_path}/old"))
