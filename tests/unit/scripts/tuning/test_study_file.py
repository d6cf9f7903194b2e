"""Study files: what they mean, and the one line about each mistake in them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from support.paths import ROOT
from support.tuning import CAP, SPACE, TARGET, make_study

from bert_fast.errors import UserError
from tuning.study_file import SINGLE, meaning_of, read_study


def contestants(**space: Any) -> dict[str, Any]:
    return {"adamw": {"set": {"optimizer.name": "adamw"}, "space": space}}


def test_a_cell_for_each_contestant_variant_and_batch(tmp_path: Path) -> None:
    study = make_study(
        tmp_path,
        variants={"all_at_once": {"set": {"communication.clip": "global_after_reduce"}}, "none": {}},
        batches={
            64: {},
            512: {
                "trials": 2,
                "set": {"batch.gradient_accumulation_steps": 8},
                "space": {"schedule.warmup_steps": {"low": 1, "high": 5, "int": True}},
            },
        },
    )
    assert [cell.name for cell in study.cells] == [
        f"{contestant}/{variant}/{batch}"
        for batch in (64, 512)
        for variant in ("all_at_once", "none")
        for contestant in ("adamw", "lamb")
    ]
    assert [cell.trials for cell in study.cells] == [4] * 4 + [2] * 4
    small, large = study.cells[0], study.cells[-1]
    assert small.space.keys() == large.space.keys() == SPACE.keys()
    assert (small.space["schedule.warmup_steps"].high, large.space["schedule.warmup_steps"].high) == (50, 5)
    config = large.config({"optimizer.lr": 0.5}, seed=99)
    assert (config.optimizer.name, config.optimizer.lr, config.train.seed) == ("lamb", 0.5, 99)
    assert config.evaluation.target_accuracy == TARGET
    assert config.batch.global_batch_size == 512
    assert config.train.max_steps == -(-CAP // 512)
    assert small.config({}, 0).communication.clip == "global_after_reduce"


def test_a_part_of_the_contestants_and_more_trials(tmp_path: Path) -> None:
    make_study(tmp_path)
    study = read_study(tmp_path / "study.yaml", ["lamb"], trials=9)
    assert [(cell.name, cell.trials) for cell in study.cells] == [("lamb/all/64", 9)]


def test_a_path_goes_on_into_lists_and_mappings(tmp_path: Path) -> None:
    soap = {
        "name": "pytorch_optimizer", "class_name": "SOAP", "arguments": {"betas": [0.95, 0.95]},
    }  # fmt: skip
    space = {"optimizer.lr": SPACE["optimizer.lr"], "optimizer.arguments.betas.1": {"choices": [0.9, 0.99]}}
    study = make_study(tmp_path, contestants={"soap": {"set": {"optimizer": soap}, "space": space}})
    point = {"optimizer.lr": 0.01, "optimizer.arguments.betas.1": 0.9}
    assert study.cells[0].config(point, 1).optimizer.arguments == {"betas": [0.95, 0.9]}
    assert study.cells[0].config({"optimizer.lr": 0.01}, 1).optimizer.arguments == {"betas": [0.95, 0.95]}


def test_a_budget_is_no_part_of_the_meaning(tmp_path: Path) -> None:
    one = make_study(tmp_path)
    more = make_study(tmp_path, trials=40, final={"seeds": [1]}, ablations={"x": {}}, execution="run")
    assert [meaning_of(one, cell) for cell in one.cells] == [meaning_of(more, cell) for cell in more.cells]
    for part, changes in (
        ("space", {"contestants": contestants(**{"optimizer.lr": {"low": 1e-4, "high": 1e-2}})}),
        ("sampler", {"sampler": {"seed": 8, "startup": 3}}),
        ("pruner", {"pruner": {"kind": "median"}}),
        ("trial_seeds", {"trial_seeds": [11]}),
        ("target, cap_samples and objective", {"cap_samples": 64 * (CAP // 64) - 1}),
        ("base and set", {"set": {"system.world_size": 1, "batch.micro_batch_size": 32, "batch.virtual_ranks": 2}}),
    ):
        other = make_study(tmp_path, **changes)
        found, expected = meaning_of(other, other.cells[0]), meaning_of(one, one.cells[0])
        assert {name for name in expected if found[name] != expected[name]} == {part}


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"contestants": contestants(**{"optimizer.learning": {"low": 0.1, "high": 1}})}, "optimizer.learning"),
        ({"contestants": contestants(**{"optimiser.lr": {"low": 0.1, "high": 1}})}, "optimiser"),
        (
            {"contestants": contestants(**{"optimizer.lr.x": {"low": 0.1, "high": 1}})},
            "there is no x in a single value",
        ),
        ({"contestants": contestants(**{"optimizer.beta2": {"low": 0.5, "high": 1.5}})}, "optimizer.beta2=1.5"),
        ({"contestants": contestants(**{"optimizer.lr": {"low": 2.0, "high": 1.0}})}, "low=2.0 is not below high=1.0"),
        ({"contestants": contestants(**{"optimizer.lr": {"low": 0.0, "high": 1.0, "log": True}})}, "low above 0"),
        ({"contestants": contestants(**{"optimizer.lr": {"low": 0.1}})}, "low and high"),
        ({"contestants": contestants(**{"optimizer.lr": {"choices": []}})}, "choices are empty"),
        ({"contestants": contestants(**{"optimizer.lr": {"choices": [1.0], "low": 0.0}})}, "choices stand alone"),
        (
            {"contestants": contestants(**{"schedule.warmup_steps": {"low": 1.5, "high": 3, "int": True}})},
            "whole bounds",
        ),
        ({"contestants": contestants()}, "space"),
        ({"contestants": {"a": {"set": {"optimizer.name": "adamx"}, "space": SPACE}}}, "did you mean adam"),
        ({"contestants": {"a": {"set": {"communication.clip": "globl"}, "space": SPACE}}}, "communication.clip"),
        ({"set": {"system.world_size": 2, "batch.micro_batch_size": 32}}, "execution=in_process runs one rank"),
        ({"final": {"seeds": [1], "batches": [128]}}, "final.batches names 128"),
        (
            {"batches": {64: {"space": {"optimizer.eps": {"low": 0.1, "high": 1}}}}},
            "optimizer.eps, which no contestant",
        ),
        ({"set": {"train.seed": 7}}, "set has train.seed, which trial_seeds and final.seeds set; remove it"),
        ({"set": {"train": {"max_steps": 7}}}, "set has train.max_steps, which cap_samples sets"),
        (
            {"contestants": contestants(**{"evaluation.target_accuracy": {"low": 0.1, "high": 0.2}})},
            "which target sets",
        ),
        ({"variants": {"a": {"set": {"batch.global_batch_size": 32}}}}, "variants.a.set has batch.global_batch_size"),
        ({"ablations": {"a": {"set": {"run.folder": "x"}}}}, "ablations.a.set has run.folder"),
        ({"final": {"seeds": [1, 12]}}, "final.seeds has 12, which trial_seeds has too"),
        ({"final": {"seeds": [1, 1]}}, "a seed twice"),
        ({"final": {"seeds": [1], "batches": []}}, "final.batches"),
        ({"contestants": contestants(**{"optimizer.lr": {"choices": [0.1, 0.1]}})}, "choices have a value twice"),
        ({"ablations": {"a": {"set": {"foo.bar": 1}}}}, "ablations.a fits no contestant: "),
        ({"ablations": {"a": {"set": {"optimizer.lr": -1}}}}, "ablations.a fits no contestant: "),
        ({"objective": "seconds"}, "cap_seconds is what a run that misses"),
        ({"cap_seconds": 3.0}, "remove it"),
        ({"batches": {100: {}}}, "batch"),
        ({"target": 1.5}, "target"),
        ({"trials": 0}, "trials"),
        ({"budget": 3}, "budget"),
        ({"pruner": {"kind": "medium"}}, "pruner"),
        ({"base": "nowhere.yaml"}, "nowhere.yaml"),
    ],
)
def test_a_mistake_is_one_line(tmp_path: Path, changes: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError) as error:
        make_study(tmp_path, **changes)
    assert said in str(error.value)
    assert "\n" not in str(error.value)


def test_an_unknown_contestant(tmp_path: Path) -> None:
    make_study(tmp_path)
    with pytest.raises(UserError, match="no contestant soap; it has adamw, lamb"):
        read_study(tmp_path / "study.yaml", ["adamw", "soap"])


@pytest.mark.parametrize("path", sorted((ROOT / "configs/tune").glob("*.yaml")), ids=lambda path: path.stem)
def test_the_shipped_studies_are_read(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every config of every contestant at both ends of its space; data need not be there."""
    monkeypatch.chdir(ROOT)
    study = read_study(path)
    file = study.file
    assert len(study.cells) == len(file.contestants) * len(file.variants) * len(file.batches)
    if path.stem in ("mini", "bert_large"):  # the others go on with the best of them, or have contestants of their own
        assert set(file.variants) == {"bucket_before_reduce", "global_after_reduce"}
        assert {"adamw", "lamb_tensor", "lamb_global", "muon", "soap", "schedule_free"} == set(file.contestants)
    for cell in study.cells:
        first = {name: dimension.ends()[0] for name, dimension in cell.space.items()}
        config = cell.config(first, file.trial_seeds[0])
        assert cell.variant in (config.communication.clip, SINGLE)
        assert config.batch.global_batch_size == cell.batch
    assert file.final is not None
    for ablation in file.ablations.values():
        for cell in study.cells if ablation.of == "winner" else study.cells[-1:]:  # each of those that can have it
            cell.config({name: dimension.ends()[0] for name, dimension in cell.space.items()}, 1, ablation.settings)
            break
