"""Checkpoints of every kind of optimizer state and of averages: bit for bit, in one process. What evaluation leaves alone."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file
from support.one_run import execute
from support.tiny_training import TinyTraining

from bert_fast.config import Config, choices
from bert_fast.errors import UserError
from bert_fast.model.checkpoints import to_huggingface
from bert_fast.optim.build import RunOptimizer, decay_groups
from bert_fast.optim.opaque import opaque_state
from bert_fast.run_folder import MODEL, checkpoint_name
from bert_fast.train.checkpoint.snapshot import load_tensors, optimizer_counts, slices_to_write
from bert_fast.train.checkpoint.storage import TensorSlice

MakeConfig = Callable[..., Config]
SCHEDULE_FREE = ("optimizer.name=schedule_free",)
SOAP = (
    "optimizer.name=pytorch_optimizer",
    "optimizer.class_name=SOAP",
    "optimizer.arguments={precondition_frequency: 2}",
)
LION = ("optimizer.name=pytorch_optimizer", "optimizer.class_name=Lion")
EXPONENTIAL = ("averaging.method=exponential", "averaging.decay=0.7")
LAST = ("averaging.method=last", "averaging.keep=3")
KINDS = {
    "schedule_free": SCHEDULE_FREE, "soap": SOAP, "lion": LION, "exponential": EXPONENTIAL, "last": LAST,
    "last and soap": (*LAST, *SOAP), "late": (*EXPONENTIAL, "averaging.start_step=4", "averaging.every_steps=2"),
    "mfac_sparse": ("optimizer.name=mfac_sparse", "optimizer.window=3", "optimizer.momentum=0.5"),
    "mfac_lowrank": ("optimizer.name=mfac_lowrank", "optimizer.window=3", "optimizer.rank=1"),
    "micro_adam": ("optimizer.name=micro_adam", "optimizer.window=3", "optimizer.density=0.1"),
}  # fmt: skip

HAVE_OTHERS = ("schedule_free", "exponential", "last", "last and soap")  # "late" begins after the test


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    if "schedule_free" in request.param:
        pytest.importorskip("schedulefree")
    if any("pytorch_optimizer" in setting for setting in KINDS[request.param]):
        pytest.importorskip("pytorch_optimizer")
    return str(request.param)


def trained(config: Config, num_steps: int = 4) -> TinyTraining:
    task = TinyTraining(0, 1, config)
    for number in range(num_steps):
        task.step(number)
    return task


def test_a_resumed_run_is_the_same_bit_for_bit(make_config: MakeConfig, tmp_path: Path, kind: str) -> None:
    """Weights, evaluated weights and losses of the steps after, and what the next checkpoint would hold."""
    config = make_config(*KINDS[kind], "train.max_steps=8")
    whole = trained(config)
    whole.save(tmp_path / "first", 4)
    resumed = TinyTraining(0, 1, config)
    resumed.load(tmp_path / "first" / checkpoint_name(4))
    for number in range(4, 8):
        assert whole.step(number).mlm_sum == resumed.step(number).mlm_sum
        np.testing.assert_array_equal(resumed.weights(), whole.weights())
        np.testing.assert_array_equal(resumed.evaluated(), whole.evaluated())
    one, two = ([(s.name, s.values.tolist()) for s in held(task)] for task in (whole, resumed))
    assert one == two
    assert optimizer_counts(resumed.components) == optimizer_counts(whole.components)
    first, second = (opaque_state(task.components.optimizer.optimizer) for task in (whole, resumed))
    assert plain(first) == plain(second)


def held(task: TinyTraining) -> list[TensorSlice]:
    """What it would write but for blocks of bytes, in which equal values may be pickled differently."""
    return [s for s in slices_to_write(task.components, task.environment) if s.values.dtype != torch.uint8]


def plain(value: Any) -> Any:
    """With lists for tensors, so that it can be compared."""
    if isinstance(value, dict):
        return {key: plain(each) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(each) for each in value]
    return value.tolist() if isinstance(value, torch.Tensor) else value


def test_an_evaluation_leaves_the_training_weights_bit_identical(make_config: MakeConfig, kind: str) -> None:
    """And the steps after it: as if it had not been."""
    config = make_config(*KINDS[kind])
    quiet, evaluated = trained(config, 5), trained(config, 0)
    for number in range(5):
        evaluated.step(number)
        before = evaluated.weights()
        other = evaluated.evaluated()
        np.testing.assert_array_equal(evaluated.weights(), before)
        has_others = number > 0 and kind in HAVE_OTHERS  # the first update takes the weights as they are
        assert np.array_equal(other, before) != has_others
    np.testing.assert_array_equal(evaluated.weights(), quiet.weights())


def test_an_error_in_an_evaluation_puts_the_weights_back(make_config: MakeConfig) -> None:
    task = trained(make_config(*EXPONENTIAL))
    before = task.weights()

    def fail() -> None:
        assert not np.array_equal(task.weights(), before)
        raise KeyError

    with pytest.raises(KeyError), task.components.evaluated_weights():
        fail()
    np.testing.assert_array_equal(task.weights(), before)


def test_a_warm_up_leaves_no_count_behind(make_config: MakeConfig) -> None:
    pytest.importorskip("schedulefree")
    fresh, warm = (TinyTraining(0, 1, make_config(*SCHEDULE_FREE, f"train.warmup_batches={n}")) for n in (0, 3))
    counts = [optimizer_counts(task.components) for task in (fresh, warm)]
    assert counts[0] == counts[1] == {"scalars": {}, "groups": [{"k": 0, "weight_sum": 0.0, "lr_max": -1.0}] * 2}


# ---- kinds of parameters --------------------------------------------------------------------------------------------


class TwoKinds(RunOptimizer):
    """Matrices have a momentum and no count; all else has a count, another number and a moment. Groups count too."""

    state_names = ("buffer", "moment")
    step_dtype = torch.float32
    scalar_names: ClassVar[dict[str, torch.dtype]] = {"product": torch.float64}
    group_state_names = ("turn", "sum")

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            group["turn"] = group.get("turn", 0) + 1
            group["sum"] = group.get("sum", 0.0) + 0.1
            for parameter in group["params"]:
                state = self.state[parameter]
                if parameter.dim() == 2:
                    state.setdefault("buffer", torch.zeros_like(parameter)).lerp_(parameter.grad, 0.1)
                    parameter.sub_(state["buffer"], alpha=group["lr"] * group["sum"])
                    continue
                state.setdefault("step", torch.zeros(())).add_(1.0)
                state.setdefault("product", torch.ones((), dtype=torch.float64)).mul_(0.9)
                state.setdefault("moment", torch.zeros_like(parameter)).add_(parameter.grad)
                parameter.sub_(state["moment"], alpha=float(group["lr"] * state["product"] / state["step"]))


def build_two_kinds(named_parameters: Any, config: Any) -> TwoKinds:
    return TwoKinds(decay_groups(named_parameters, 0.0), {"lr": config.lr})


@pytest.fixture
def two_kinds(monkeypatch: pytest.MonkeyPatch) -> str:
    entry = choices.OptimizerChoice(f"{__name__}:build_two_kinds", "made up")
    monkeypatch.setitem(choices.OPTIMIZERS, "two_kinds", entry)
    return "optimizer.name=two_kinds"


def test_each_kind_of_parameter_gets_back_what_it_had(make_config: MakeConfig, tmp_path: Path, two_kinds: str) -> None:
    config = make_config(two_kinds)
    whole, resumed = trained(config), TinyTraining(0, 1, config)
    assert optimizer_counts(whole.components) == {
        "scalars": {"moment": {"step": 4.0, "product": 0.9 * 0.9 * 0.9 * 0.9}},
        "groups": [{"turn": 4, "sum": 0.1 + 0.1 + 0.1 + 0.1}] * 2,
    }
    whole.save(tmp_path, 4)
    resumed.load(tmp_path / checkpoint_name(4))
    for before, after in zip(whole.components.optimizer.slices, resumed.components.optimizer.slices, strict=True):
        old = whole.components.optimizer.optimizer.state[before.parameter]
        new = resumed.components.optimizer.optimizer.state[after.parameter]
        assert set(new) == set(old) == ({"buffer"} if before.parameter.dim() == 2 else {"step", "product", "moment"})
        assert all(torch.equal(new[name], old[name]) and new[name].dtype == old[name].dtype for name in old)
    whole.step(4)
    resumed.step(4)
    np.testing.assert_array_equal(resumed.weights(), whole.weights())


def test_a_checkpoint_of_other_groups_is_one_line(make_config: MakeConfig, tmp_path: Path) -> None:
    task = trained(make_config())
    task.save(tmp_path, 4)
    counts = optimizer_counts(task.components) | {"groups": [{}]}
    with pytest.raises(UserError, match=r"is damaged \(it has 1 groups of parameters and the optimizer 2\); remove it"):
        load_tensors(tmp_path / checkpoint_name(4), task.components, task.environment, counts, num_ranks=1)


def test_bytes_that_are_no_state_are_one_line(make_config: MakeConfig, tmp_path: Path) -> None:
    pytest.importorskip("pytorch_optimizer")
    plain, lion = trained(make_config()), trained(make_config(*LION))
    plain.save(tmp_path, 4)
    counts = optimizer_counts(lion.components)
    with pytest.raises(UserError, match=r"cannot be read \(optimizer_state: TypeError: .*\); remove it"):
        load_tensors(tmp_path / checkpoint_name(4), lion.components, lion.environment, counts, num_ranks=1)


# ---- whole runs -----------------------------------------------------------------------------------------------------


def exported(config: Config) -> dict[str, np.ndarray]:
    return load_file(Path(config.run.folder) / MODEL / "model.safetensors")


@pytest.mark.parametrize("settings", [EXPONENTIAL, SCHEDULE_FREE])
def test_a_run_evaluates_and_exports_the_average(make_config: MakeConfig, settings: tuple[str, ...]) -> None:
    if settings is SCHEDULE_FREE:
        pytest.importorskip("schedulefree")
    config = make_config(
        *settings, "train.max_steps=4", "evaluation.every_samples=16", "checkpoint.save_final_model=true"
    )
    _, summary = execute(config)
    components = summary.prepared.components
    model = components.model
    trained_weights = to_huggingface(model.state_dict(), config.model)
    with components.evaluated_weights():
        averaged = {name: value.clone() for name, value in to_huggingface(model.state_dict(), config.model).items()}
    name = "bert.embeddings.word_embeddings.weight"
    assert not torch.equal(trained_weights[name], averaged[name])
    for key, value in exported(config).items():
        np.testing.assert_array_equal(value, averaged[key].numpy(), err_msg=key)
