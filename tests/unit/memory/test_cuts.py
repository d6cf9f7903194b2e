"""Any module in stages: the same result, gradients and buffers as the module's, bit for bit, whatever is computed again."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from transformers import BertConfig, BertModel

from bert_fast.errors import UserError
from bert_fast.memory.chain import measure_chain
from bert_fast.memory.cuts import CutModule, CutStage, cut_module
from bert_fast.memory.meter import LiveBytes, storages_before
from bert_fast.memory.remat import Chain, Plan, Segment, keep_all, least_peak, make_plan
from bert_fast.memory.segments import SegmentRunner


class Residual(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.first, self.second = (nn.Conv2d(width, width, 3, padding=1, bias=False) for _ in range(2))
        self.first_norm, self.second_norm = nn.BatchNorm2d(width), nn.BatchNorm2d(width)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        inner = self.relu(self.first_norm(self.first(images)))
        return self.relu(self.second_norm(self.second(inner)) + images)


def residual_net() -> nn.Module:
    stem = [nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU()]
    head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(0.2), nn.Linear(8, 10)]
    return nn.Sequential(*stem, *(Residual(8) for _ in range(4)), *head)


def perceptron() -> nn.Module:
    layers = [nn.Sequential(nn.Linear(32, 32), nn.ReLU(), nn.Dropout(0.1)) for _ in range(5)]
    return nn.Sequential(*layers, nn.Linear(32, 3))


def bert() -> nn.Module:
    sizes = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 128}
    return BertModel(BertConfig(vocab_size=100, max_position_embeddings=64, **sizes))


class SharedNorm(nn.Module):
    """A norm that is used twice, a mask that is drawn once for all layers, and random numbers that nobody reads."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(5))
        self.norm, self.own_norm = nn.BatchNorm1d(8), nn.BatchNorm1d(8)

    def forward(self, rows: torch.Tensor, scale: float, *, offset: torch.Tensor) -> dict[str, torch.Tensor]:
        rows = self.norm(self.layers[0](rows)).relu()
        rows = F.dropout(self.norm(self.layers[1](rows)).relu(), 0.1)
        F.dropout(rows, 0.3)
        drawn = (torch.rand(8) > 0.3).float()
        rows = self.layers[2](rows * drawn).tanh()
        with torch.no_grad():
            size = F.dropout(rows.abs(), 0.1).mean()
        rows = self.own_norm(self.layers[3](rows * drawn)).relu() / size
        shift = offset.float().cos() * scale  # free, and read by two stages
        return {"size": size, "rows": F.dropout(self.layers[4](rows + shift), 0.1).tanh() + shift}


class Lists(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = perceptron()

    def forward(self, pair: list[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        rows = self.body(pair[0] + pair[1])
        return rows, rows.argmax(-1)


def padded_mask(rows: int, length: int) -> torch.Tensor:
    mask = torch.ones(rows, length, dtype=torch.long)
    mask[1, length // 2 :] = 0
    return mask


@dataclass(frozen=True)
class Case:
    make: Callable[[], nn.Module]
    args: tuple[Any, ...]
    kwargs: dict[str, Any] = field(default_factory=dict)
    output: Callable[[Any], Any] | None = None
    result_of: Callable[[Any], torch.Tensor] | None = None  # where the module returns more than its result


_random = torch.Generator().manual_seed(7)
IDS = torch.randint(0, 100, (8, 32), generator=_random)
ROWS = torch.randn(64, 32, generator=_random)
CASES = {
    "residual net": Case(residual_net, (torch.randn(8, 3, 16, 16, generator=_random),)),
    "bert": Case(
        bert,
        (IDS,),
        {"attention_mask": padded_mask(8, 32)},
        lambda returned: returned.last_hidden_state,
        lambda returned: returned.last_hidden_state,
    ),
    "perceptron": Case(perceptron, (ROWS,)),
    "shared norm": Case(
        SharedNorm,
        (torch.randn(6, 8, generator=_random), 0.5),
        {"offset": torch.arange(8)},
        result_of=lambda returned: returned["rows"],
    ),
    "lists": Case(Lists, ([ROWS, ROWS.flip(0)],), result_of=lambda returned: returned[0]),
}


@dataclass(frozen=True)
class Cut:
    case: Case
    module: nn.Module
    cut: CutModule
    chain: Chain

    def call(self) -> torch.Tensor:
        return self.cut(*self.case.args, **self.case.kwargs)

    def call_original(self, module: nn.Module) -> torch.Tensor:
        returned = module(*self.case.args, **self.case.kwargs)
        return returned if self.case.result_of is None else self.case.result_of(returned)


def loss_of(result: torch.Tensor) -> torch.Tensor:
    return result.pow(2).sum()


def cut_case(name: str) -> Cut:
    case = CASES[name]
    torch.manual_seed(1)
    module = case.make().train()
    cut = cut_module(module, *case.args, output=case.output, **case.kwargs)
    stages, first = cut.stages_of(*case.args, **case.kwargs)
    return Cut(case, module, cut, measure_chain(stages, first, loss_of, timed=False))


def two_steps(module: nn.Module, call: Callable[[], torch.Tensor]) -> list[torch.Tensor | None]:
    """Results, gradients and buffers of two forward and backward passes."""
    torch.manual_seed(2)
    results = []
    for _ in range(2):
        result = call()
        loss_of(result).backward()
        results.append(result.detach())
    gradients = [None if p.grad is None else p.grad.clone() for p in module.parameters()]
    return [*results, *gradients, *(buffer.clone() for buffer in module.buffers()), torch.get_rng_state()]


def plans_of(chain: Chain) -> dict[str, Plan]:
    """What is kept and computed again: nothing, for the least peak, each stage alone, and all but the loss in one go."""
    count = len(chain.stages)
    alone = {
        chain.stages[number].name: make_plan(chain, [Segment(k, k + 1, recompute=k == number) for k in range(count)])
        for number in range(count - 1)
    }
    whole = make_plan(chain, [Segment(0, count - 1, recompute=True), Segment(count - 1, count, recompute=False)])
    return {"keep all": keep_all(chain), "least peak": least_peak(chain), "whole": whole, **alone}


@pytest.mark.parametrize("name", list(CASES))
def test_nothing_changes_bit_for_bit(name: str) -> None:
    found = cut_case(name)
    original = copy.deepcopy(found.module)
    buffers = [buffer.clone() for buffer in found.module.buffers()]
    expected = two_steps(original, lambda: found.call_original(original))
    for plan_name, plan in plans_of(found.chain).items():
        found.module.zero_grad(set_to_none=True)
        for buffer, value in zip(found.module.buffers(), buffers, strict=True):
            buffer.copy_(value)
        found.cut.run_stages = SegmentRunner(plan.segments)
        got = two_steps(found.module, found.call)
        for number, (left, right) in enumerate(zip(expected, got, strict=True)):
            same = left is right if left is None or right is None else torch.equal(left, right)
            assert same, (plan_name, number)


def test_gradients_come_to_the_modules_own_weights_and_to_an_input() -> None:
    torch.manual_seed(1)
    module, rows = perceptron(), ROWS.clone().requires_grad_()
    cut = cut_module(module, rows)
    assert list(cut.parameters()) == list(module.parameters())
    stages, first = cut.stages_of(rows)
    assert first is rows
    expected = two_steps(module, lambda: module(rows)), rows.grad
    rows.grad = None
    module.zero_grad()
    cut.run_stages = SegmentRunner([Segment(0, len(stages), recompute=True)])
    got = two_steps(module, lambda: cut(rows)), rows.grad
    assert all(torch.equal(a, b) for a, b in zip(expected[0], got[0], strict=True) if a is not None and b is not None)
    assert expected[1] is not None
    assert got[1] is not None
    assert torch.equal(expected[1], got[1])


def test_bert_is_cut_after_both_norms_of_every_layer() -> None:
    names = [stage.name for stage in cut_case("bert").chain.stages]
    for number in range(3):
        for part in ("attention.output.LayerNorm:", "output.LayerNorm:"):
            assert sum(name.startswith(f"encoder.layer.{number}.{part}") for name in names) == 1, names
    assert len(set(names)) == len(names)


def test_a_residual_net_is_cut_after_every_block() -> None:
    found = cut_case("residual net")
    names = [stage.name.partition(":")[0] for stage in found.chain.stages]
    assert [name for name in names if name.endswith(".relu")] == [f"{number}.relu" for number in range(3, 7)]


def test_a_view_is_no_stage_of_its_own() -> None:
    layers = [
        nn.Conv2d(3, 4, 3),
        nn.ReLU(),
        nn.Dropout(0.1),
        nn.Flatten(),
        nn.Linear(144, 8),
        nn.ReLU(),
        nn.Linear(8, 2),
    ]
    stages, _ = cut_module(nn.Sequential(*layers), IMAGES).stages_of(IMAGES)
    assert [stage.name.partition(":")[0] for stage in stages] == ["2", "5", "6"]


def test_what_several_stages_read_is_computed_once() -> None:
    """The mask of BERT's attention: it is the same tensor for all layers."""
    found = cut_case("bert")
    made = 0

    class Count(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            nonlocal made
            made += func is torch.ops.aten.arange.default
            return func(*args, **(kwargs or {}))

    with Count():
        found.call_original(found.module)
    once, made = made, 0
    found.cut.run_stages = SegmentRunner(plans_of(found.chain)["whole"].segments)
    with Count():
        loss_of(found.call()).backward()
    assert 0 < made <= once


def measured_peak(found: Cut, plan: Plan) -> int:
    """Of a whole step, with gradients that are there before."""
    found.cut.run_stages = SegmentRunner(plan.segments)
    for parameter in found.module.parameters():
        parameter.grad = torch.zeros_like(parameter)

    def step() -> None:
        loss_of(found.call()).backward()

    step()
    with LiveBytes(storages_before(step)) as live:
        step()
        return live.peak


@pytest.mark.parametrize("name", ["bert", "residual net", "perceptron"])
def test_plans_have_the_peaks_that_are_measured(name: str) -> None:
    found = cut_case(name)
    least, kept = least_peak(found.chain), keep_all(found.chain)
    assert least.peak_bytes < 0.6 * kept.peak_bytes
    for plan in (least, kept):
        assert measured_peak(found, plan) == pytest.approx(plan.peak_bytes, rel=0.05)


def test_cutting_and_measuring_leave_no_trace() -> None:
    torch.manual_seed(1)
    module = residual_net()
    before, drawn = copy.deepcopy(module.state_dict()), torch.get_rng_state()
    cut = cut_module(module, *CASES["residual net"].args)
    assert torch.equal(drawn, torch.get_rng_state())
    stages, first = cut.stages_of(*CASES["residual net"].args)
    measure_chain(stages, first, loss_of, timed=False)
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())
    assert all(parameter.grad is None for parameter in module.parameters())
    assert all(isinstance(stage, CutStage) for stage in stages)


def test_evaluation_is_the_modules_own() -> None:
    found = cut_case("bert")
    found.cut.eval()
    with torch.no_grad():
        assert torch.equal(found.call(), found.call_original(found.module))
        short = IDS[:2, :5]
        assert found.cut(short).shape == (2, 5, 32)


def test_a_cut_without_memory_for_a_whole_step() -> None:
    """Nothing real is kept for backward while the module is cut."""
    kept = 0

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        nonlocal kept
        kept += type(tensor) in (torch.Tensor, nn.Parameter)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        cut = cut_module(perceptron(), ROWS, check_gradients=False)
    assert kept == 0
    assert len(cut.stages_of(ROWS)[0]) > 5


class Forward(nn.Module):
    """Two layers, with a function between."""

    def __init__(self, between: Callable[[nn.Module, torch.Tensor], Any]) -> None:
        super().__init__()
        self.first, self.second, self._between = nn.Linear(32, 32), nn.Linear(32, 32), between
        self.register_buffer("mean", torch.zeros(32))
        self.calls = 0

    def forward(self, rows: torch.Tensor) -> Any:
        return self.second(self._between(self, self.first(rows).relu()).tanh())


class Returning(nn.Module):
    """Two layers, with a function of what they return."""

    def __init__(self, result: Callable[[torch.Tensor], Any]) -> None:
        super().__init__()
        self.body, self._result = perceptron(), result

    def forward(self, rows: torch.Tensor) -> Any:
        return self._result(self.body(rows))


class SkipOverAll(nn.Module):
    """A net in the shape of a U: what enters it is added to what it returns, so that it waits for all of it."""

    def __init__(self) -> None:
        super().__init__()
        self.enter, self.leave = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.down, self.up = nn.Conv2d(8, 16, 2, stride=2), nn.ConvTranspose2d(16, 8, 2, stride=2)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        entered = self.enter(images)
        return self.leave(self.up(self.down(entered).relu()).relu()) + entered


class Straight(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: torch.Tensor) -> torch.Tensor:
        return rows.round()

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> torch.Tensor:
        return gradients[0]


def count_calls(module: nn.Module, rows: torch.Tensor) -> torch.Tensor:
    module.calls += 1
    return rows * module.calls


def assign_buffer(module: nn.Module, rows: torch.Tensor) -> torch.Tensor:
    module.mean = 0.9 * module.mean + 0.1 * rows.detach().mean(0)
    return rows


def change_weight(module: nn.Module, rows: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        module.second.weight.clamp_(-1, 1)
    return rows


def branch_on_data(module: nn.Module, rows: torch.Tensor) -> torch.Tensor:
    return rows if rows.sum() > 0 else -rows


IMAGES = torch.randn(2, 3, 8, 8, generator=_random)
REFUSED: dict[str, tuple[Callable[[], nn.Module], torch.Tensor, str]] = {
    "branch": (lambda: Forward(branch_on_data), ROWS, "cannot be traced by torch.export: Could not guard on"),
    "skip over all": (SkipOverAll, IMAGES, "cannot be cut: .*torch.utils.checkpoint by hand"),
    "single operation": (lambda: nn.Linear(32, 3), ROWS, "Linear cannot be cut"),
    "numpy": (lambda: Forward(lambda _, rows: rows * np.random.rand()), ROWS, "not the same twice.*numpy.random"),
    "random": (lambda: Forward(lambda _, rows: rows * random.random()), ROWS, "not the same twice.*draw with torch"),
    "counter": (lambda: Forward(count_calls), ROWS, "not the same twice.*counters"),
    "function": (lambda: Forward(lambda _, r: Straight.apply(r)), ROWS, "has not the gradients.*autograd.Function"),
    "buffer": (lambda: Forward(assign_buffer), ROWS, "has not the buffers of the module.*in place"),
    "weight": (lambda: Forward(change_weight), ROWS, "changes p_module_second_weight in place"),
    "two outputs": (lambda: Returning(lambda rows: (rows, rows + 1)), ROWS, "returns 2 tensors .*output="),
    "no output": (lambda: Returning(torch.Tensor.detach), ROWS, "returns 0 tensors .*output="),
    "evaluation": (lambda: perceptron().eval(), ROWS, r"in evaluation mode.*call train\(\)"),
}


@pytest.mark.parametrize("name", list(REFUSED))
def test_what_cannot_be_cut_is_refused_in_one_line(name: str) -> None:
    make, example, text = REFUSED[name]
    with pytest.raises(UserError, match=text) as caught:
        cut_module(make(), example)
    assert "\n" not in str(caught.value)


def test_an_output_is_picked() -> None:
    module = Returning(lambda rows: (rows, {"loss": rows.pow(2).mean(), "count": 3}))
    cut = cut_module(module, ROWS, output=lambda returned: returned[1]["loss"])
    torch.manual_seed(3)
    loss = cut(ROWS)
    torch.manual_seed(3)
    assert torch.equal(loss, module(ROWS)[1]["loss"])
    for output in (lambda returned: returned[1]["count"], lambda returned: returned[0].detach()):
        with pytest.raises(UserError, match="output= picks no tensor of Returning"):
            cut_module(module, ROWS, output=output)


def test_inputs_are_those_of_the_example() -> None:
    cut = cut_module(perceptron(), ROWS)
    for other in (ROWS[:5], ROWS.double()):
        with pytest.raises(UserError, match=r"was cut for \(float32 \[64, 32\]\) and is called with") as caught:
            cut(other)
        assert "\n" not in str(caught.value)
    found = CASES["shared norm"]
    shared = cut_module(found.make(), *found.args, **found.kwargs)
    assert torch.is_tensor(shared(offset=found.kwargs["offset"], scale=0.5, rows=found.args[0]))
    with pytest.raises(UserError, match=r"0\.5.*0\.25"):
        shared(found.args[0], 0.25, **found.kwargs)
    with pytest.raises(UserError, match="is given a Generator, which a trace does not look into"):
        cut_module(Returning(lambda rows: rows), torch.Generator())
