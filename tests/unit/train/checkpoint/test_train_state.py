"""What changes in a run as one object: a round trip, and a file that anybody may have written."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from support.steps import PlannedSteps, cpu_rank

from bert_fast.balance.cost import CostModel
from bert_fast.config import Config
from bert_fast.errors import UserError
from bert_fast.report.schema import EvaluationLine
from bert_fast.train.checkpoint.train_state import TrainState, parse_description
from bert_fast.train.clock import Clock
from bert_fast.train.setup.build import build

PATH = Path("run/checkpoints/step-00000002")
COST = CostModel(2.0, 0.5)
EVALUATION = EvaluationLine(step=2, samples=16, time_s=1.5, accuracy=0.25, mlm_loss=6.0, nsp_accuracy=0.5, nsp_loss=0.7)


def state_of(config: Config, cost: CostModel = COST) -> TrainState:
    environment = cpu_rank()
    return TrainState(build(config, environment), environment, Clock(), cost, "a test")


@pytest.fixture
def description(make_config: Callable[..., Config]) -> dict[str, Any]:
    """What complete.json holds after two steps, as it is read back."""
    config = make_config()
    state, steps = state_of(config), PlannedSteps(config)
    state.clock.start()
    with state.clock.pause("evaluation"):
        pass
    for number in range(2):
        planned = steps.planned(number)
        state.components.step(steps.input(number), lr=0.01)
        state.progress.count(planned, 8, 0.5)
        state.progress.add("imbalance", 1.25)
    state.progress.evaluations.append(EVALUATION)
    state.progress.joules = [12.5, None]
    described: dict[str, Any] = json.loads(json.dumps(state.describe({"settings": {}})))
    return described


def test_a_state_comes_back(make_config: Callable[..., Config], description: dict[str, Any]) -> None:
    parsed = parse_description(PATH, description)
    assert (parsed.step, parsed.world_size, parsed.key) == (2, 1, {"settings": {}})
    other = state_of(make_config(), CostModel(1.0, 0.0))
    other.load_state_dict(parsed.state)
    assert other.progress.step == 2
    assert other.progress.samples == 16
    assert other.progress.joules == [12.5, None]
    assert other.progress.evaluations == [EVALUATION]
    assert other.progress.mean("imbalance") == 1.25
    assert (other.cost, other.cost_source) == (COST, "the resumed run")
    assert other.clock.paused.keys() == {"evaluation"}
    again = other.state_dict()
    expected = description["state"]
    assert again["progress"] == expected["progress"]
    assert json.dumps(again["progress"]) == json.dumps(expected["progress"]), "whole numbers stay whole"
    assert again["cost"] == expected["cost"]
    assert again["loss_scale"] is None
    assert again["clock"]["paused"] == expected["clock"]["paused"]
    assert again["clock"]["elapsed"] >= expected["clock"]["elapsed"] > 0


def test_an_evaluation_without_next_sentence_comes_back(
    make_config: Callable[..., Config], description: dict[str, Any]
) -> None:
    description["state"]["progress"]["evaluations"][0] |= {"nsp_accuracy": None, "nsp_loss": None}
    other = state_of(make_config())
    other.load_state_dict(parse_description(PATH, description).state)
    assert other.progress.evaluations == [replace(EVALUATION, nsp_accuracy=None, nsp_loss=None)]


def test_the_same_cost_keeps_its_source(make_config: Callable[..., Config], description: dict[str, Any]) -> None:
    other = state_of(make_config())
    other.load_state_dict(parse_description(PATH, description).state)
    assert other.cost_source == "a test"


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The path to every value in nested dicts and lists."""
    found = [path] if path else []
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        found += places(inner, (*path, key))
    return found


def set_at(value: Any, path: tuple[Any, ...], new: Any) -> None:
    for key in path[:-1]:
        value = value[key]
    value[path[-1]] = new


WRONG = ("a string", [[]], {"x": {}}, True, math.nan)


def test_every_wrong_type_anywhere_is_one_line_that_names_the_place(description: dict[str, Any]) -> None:
    every = places(description["state"])
    assert len(every) > 25
    for path in every:
        for wrong in WRONG:
            if path[-1] in ("mlm_loss", "nsp_loss") and isinstance(wrong, float):
                continue  # of a run that has diverged
            damaged = copy.deepcopy(description)
            set_at(damaged["state"], path, wrong)
            with pytest.raises(UserError) as raised:
                parse_description(PATH, damaged)
            text = str(raised.value)
            assert len(text.splitlines()) == 1, text
            assert text.startswith(f"checkpoint {PATH} is damaged (complete.json: state."), text
            named = text.split("complete.json: ")[1].split(": ")[0]
            assert named.startswith(".".join(map(str, ("state", *path)))), (path, wrong, text)
            assert text.endswith("; remove it")


def test_what_is_missing_or_too_much_is_named(description: dict[str, Any]) -> None:
    for section in ("progress", "clock", "optimizer", "cost", "loss_scale"):
        damaged = copy.deepcopy(description)
        del damaged["state"][section]
        with pytest.raises(UserError, match=rf"complete\.json: state\.{section}: Field required"):
            parse_description(PATH, damaged)
    damaged = copy.deepcopy(description)
    damaged["state"]["progress"]["unheard_of"] = 1
    with pytest.raises(UserError, match=r"state\.progress\.unheard_of: Extra inputs"):
        parse_description(PATH, damaged)
    damaged = copy.deepcopy(description)
    damaged["state"]["progress"]["step"] = -1
    with pytest.raises(UserError, match=r"state\.progress\.step: "):
        parse_description(PATH, damaged)


@pytest.mark.parametrize(
    ("name", "wrong"), [("key", []), ("key", None), ("world_size", "2"), ("step", 2.0), ("step", True), ("state", None)]
)
def test_the_outer_fields(description: dict[str, Any], name: str, wrong: Any) -> None:
    with pytest.raises(UserError, match=r"is damaged \(complete\.json"):
        parse_description(PATH, {**description, name: wrong})
