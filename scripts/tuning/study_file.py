"""The study file: a base config, the contestants with their spaces, the budget; read, and checked before anything starts.

A setting is named by its path in the config, `optimizer.lr`; where a field holds a mapping or a list the path goes on into it,
`optimizer.arguments.betas.1`.
"""

from __future__ import annotations

import copy
import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, model_validator

from bert_fast.config import Config, sections
from bert_fast.config.load import config_from_tree
from bert_fast.config.yaml_files import read_yaml, validate
from bert_fast.errors import UserError

EXAMPLE = "configs/tune/mini.yaml"
SINGLE = "all"  # the variant of a study that lists none

Value = bool | int | float | str | None
Settings = dict[str, Any]  # values of a config by path
Name = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9_.-]{1,60}$")]
TrialCount = Annotated[int, Field(gt=0, le=100_000)]
RunSeed = Annotated[int, Field(ge=0, le=2**63 - 1)]
Fraction = Annotated[float, Field(gt=0, lt=1, allow_inf_nan=False)]


_OWNED = {  # settings that a study decides, and by what
    "train.seed": "trial_seeds and final.seeds set",
    "train.max_steps": "cap_samples sets",
    "evaluation.target_accuracy": "target sets",
    "batch.global_batch_size": "batches set",
    "run.folder": "the search chooses for each run",
    "run.tensorboard": "the search switches off",
    "run.measure_peak_flops": "the search switches off",
    "mlperf.enabled": "the search switches off",
    "checkpoint.save_final_model": "the search switches off",
}


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Dimension(_Part):
    """One searched setting: a range from `low` to `high`, both included, or a list of `choices`."""

    low: float | None = None
    high: float | None = None
    log: bool = False
    whole: bool = Field(False, alias="int")
    choices: list[Value] | None = None

    @model_validator(mode="after")
    def _is_a_range_or_a_list(self) -> Dimension:
        if self.choices is not None:
            if self.low is not None or self.high is not None or self.log or self.whole:
                raise ValueError("choices stand alone; remove low, high, log and int")
            if not self.choices:
                raise ValueError("choices are empty; list at least one value")
            if len({(type(each), each) for each in self.choices}) < len(self.choices):
                raise ValueError("choices have a value twice; list each once")
            return self
        if self.low is None or self.high is None:
            raise ValueError("a dimension needs low and high, or choices; add them")
        if not (math.isfinite(self.low) and math.isfinite(self.high) and self.low < self.high):
            raise ValueError(f"low={self.low} is not below high={self.high}; swap or change them")
        if self.log and self.low <= 0:
            raise ValueError(f"log=true needs a low above 0, not {self.low}; raise it")
        if self.whole and not (self.low.is_integer() and self.high.is_integer()):
            raise ValueError(f"int=true needs whole bounds, not {self.low} and {self.high}; round them")
        return self

    def ends(self) -> list[Value]:
        """The outermost values: both bounds, or all choices."""
        if self.choices is not None:
            return list(self.choices)
        assert self.low is not None
        assert self.high is not None
        return [int(each) if self.whole else each for each in (self.low, self.high)]


class Sampler(_Part):
    """How points are chosen: `startup` at random, the others by a tree-structured Parzen estimator (tpe)."""

    kind: Literal["tpe", "random"] = "tpe"
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    startup: Annotated[int, Field(ge=1, le=10_000)] = 6


class Pruner(_Part):
    """Which trials end before the target or the cap. Counts are of evaluations; trials are those of the same study.

    median:  one whose best accuracy is below the median of the others at the same evaluation
    halving: one that is not among the best 1/`reduction_factor` at evaluation `min_evaluations`, and at each
             `reduction_factor`-fold of it
    """

    kind: Literal["none", "median", "halving"] = "none"
    startup: Annotated[int, Field(ge=0, le=10_000)] = 4
    min_evaluations: Annotated[int, Field(ge=1, le=10_000)] = 4
    reduction_factor: Annotated[int, Field(ge=2, le=100)] = 3


class Contestant(_Part):
    """Settings of an optimizer, and the space in which its own are searched."""

    settings: Settings = Field(default_factory=dict, alias="set")
    space: Annotated[dict[str, Dimension], Field(min_length=1)]


class Variant(_Part):
    """Settings under which every contestant is searched once more."""

    settings: Settings = Field(default_factory=dict, alias="set")


class Ablation(_Part):
    """Settings that the last round changes in the best point of the winner, or of each contestant that can have them."""

    settings: Settings = Field(default_factory=dict, alias="set")
    of: Literal["winner", "each"] = "winner"


class Batch(_Part):
    """Settings of a global batch, and the trials of each contestant there (the study's if unset).

    space: dimensions in place of those of the same name, for the contestants that have one
    """

    settings: Settings = Field(default_factory=dict, alias="set")
    space: dict[str, Dimension] = Field(default_factory=dict)
    trials: TrialCount | None = None


class Final(_Part):
    """The last round: fresh seeds, at these global batches (the first of the study if unset).

    stretch: of the schedule and the cap of all points: as many times as long as in the search
    """

    seeds: Annotated[list[RunSeed], Field(min_length=1, max_length=1000)]
    batches: Annotated[list[int], Field(min_length=1)] | None = None
    stretch: Annotated[float, Field(ge=1, le=100)] = 1.0

    @model_validator(mode="after")
    def _seeds_are_different(self) -> Final:
        if len(set(self.seeds)) < len(self.seeds):
            raise ValueError("final.seeds has a seed twice; name each once")
        return self


class StudyFile(_Part):
    """What is searched, and with which budget; the same for every contestant."""

    name: Name
    base: str
    settings: Settings = Field(default_factory=dict, alias="set")
    target: Fraction
    cap_samples: Annotated[int, Field(gt=0, le=10**12)]
    cap_seconds: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None
    objective: Literal["samples", "seconds"] = "samples"
    trials: TrialCount
    sampler: Sampler = Field(default_factory=Sampler)
    pruner: Pruner = Field(default_factory=Pruner)
    trial_seeds: Annotated[list[RunSeed], Field(min_length=1, max_length=1000)] = [0]
    contestants: Annotated[dict[Name, Contestant], Field(min_length=1)]
    variants: Annotated[dict[Name, Variant], Field(min_length=1)] = {SINGLE: Variant(set={})}
    batches: Annotated[dict[Annotated[int, Field(gt=0, le=2**18)], Batch], Field(min_length=1)]
    final: Final | None = None
    ablations: dict[Name, Ablation] = Field(default_factory=dict)
    execution: Literal["in_process", "run"] = "in_process"

    @property
    def cap(self) -> float:
        """What a run counts as that has not come to the target, in the unit of the objective."""
        return float(self.cap_samples if self.cap_seconds is None else self.cap_seconds)

    @model_validator(mode="after")
    def _seconds_have_a_cap(self) -> StudyFile:
        if (self.objective == "seconds") != (self.cap_seconds is not None):
            raise ValueError(
                "cap_seconds is what a run that misses the target counts as with objective: seconds, and belongs to it alone; "
                f"{'remove it' if self.objective == 'samples' else 'set it to more than the slowest run to the target takes'}"
            )
        return self

    @model_validator(mode="after")
    def _what_the_study_sets_is_set_nowhere_else(self) -> StudyFile:
        parts = {
            "set": self.settings,
            **{f"contestants.{name}.set": each.settings for name, each in self.contestants.items()},
            **{f"contestants.{name}.space": each.space for name, each in self.contestants.items()},
            **{f"variants.{name}.set": each.settings for name, each in self.variants.items()},
            **{f"batches.{name}.set": each.settings for name, each in self.batches.items()},
            **{f"ablations.{name}.set": each.settings for name, each in self.ablations.items()},
        }
        for where, settings in parts.items():
            for path, value in settings.items():
                inner = [f"{path}.{key}" for key in value] if isinstance(value, dict) else []
                for owned in (each for each in (path, *inner) if each in _OWNED):
                    raise ValueError(f"{where} has {owned}, which {_OWNED[owned]}; remove it")
        return self

    @model_validator(mode="after")
    def _final_seeds_are_fresh(self) -> StudyFile:
        old = sorted(set(self.final.seeds) & set(self.trial_seeds)) if self.final else []
        if old:
            raise ValueError(
                f"final.seeds has {old[0]}, which trial_seeds has too; take seeds that were not searched with"
            )
        return self

    @model_validator(mode="after")
    def _final_batches_are_searched(self) -> StudyFile:
        unknown = [each for each in (self.final.batches or [] if self.final else []) if each not in self.batches]
        if unknown:
            raise ValueError(f"final.batches names {unknown[0]}, which is not in batches; add it there or remove it")
        searched = {name for contestant in self.contestants.values() for name in contestant.space}
        idle = [name for batch in self.batches.values() for name in batch.space if name not in searched]
        if idle:
            raise ValueError(f"batches have a space for {idle[0]}, which no contestant searches; remove it")
        return self


@dataclass(frozen=True)
class Cell:
    """One study of the search: a contestant under a variant at a global batch.

    tree:   settings of all its trials, as a config file has them; a trial adds its point and its seed
    trials: its budget
    """

    contestant: str
    variant: str
    batch: int
    tree: dict[str, Any]
    space: Mapping[str, Dimension]
    trials: int

    @property
    def name(self) -> str:
        return f"{self.contestant}/{self.variant}/{self.batch}"

    def config(self, point: Mapping[str, Any], seed: int, more: Mapping[str, Any] | None = None) -> Config:
        """The config of a point. Raises UserError where the settings do not fit together.

        Args:
            more: settings over those of the cell and the point, as an ablation has them.
        """
        tree = with_settings(self.tree, {**point, **(more or {}), "train.seed": seed})
        return config_from_tree(tree, self.name)


@dataclass(frozen=True)
class Study:
    """A study file that has been read: its text, and its cells in the order of the file."""

    path: Path
    file: StudyFile
    cells: tuple[Cell, ...]


def read_study(path: str | Path, contestants: list[str] | None = None, trials: int | None = None) -> Study:
    """Read and check a study file.

    Args:
        contestants: only these; all if None.
        trials: per cell, in place of the file's numbers.

    Raises:
        UserError: one line with the file, what is wrong in it, and how to fix it.
    """
    file = validate(StudyFile, read_yaml(path, "study file", "a study", EXAMPLE), str(path))
    unknown = [each for each in contestants or [] if each not in file.contestants]
    if unknown:
        raise UserError(
            f"{path} has no contestant {unknown[0] or '(empty name)'}; it has {', '.join(file.contestants)}"
        )
    base = read_yaml(file.base, "base config", f"sections ({', '.join(sections())})", "configs/mini_cpu.yaml")
    cells = [
        _cell(file, base, contestant, variant, batch, trials)
        for batch in file.batches
        for variant in file.variants
        for contestant in file.contestants
        if contestants is None or contestant in contestants
    ]
    for cell in cells:
        _check_space(cell, str(path), file)
    _check_ablations(cells, str(path), file)
    return Study(Path(path), file, tuple(cells))


def _cell(file: StudyFile, base: dict[str, Any], contestant: str, variant: str, batch: int, trials: int | None) -> Cell:
    chosen = file.contestants[contestant]
    layers = (
        file.settings,
        {"batch.global_batch_size": batch},
        file.batches[batch].settings,
        file.variants[variant].settings,
        chosen.settings,
        {
            "evaluation.target_accuracy": file.target,
            "train.max_steps": math.ceil(file.cap_samples / batch),
        },
    )
    tree = base
    for layer in layers:
        tree = with_settings(tree, layer)
    space = {name: file.batches[batch].space.get(name, dimension) for name, dimension in chosen.space.items()}
    return Cell(contestant, variant, batch, tree, space, trials or file.batches[batch].trials or file.trials)


def with_settings(tree: dict[str, Any], settings: Mapping[str, Any]) -> dict[str, Any]:
    """A copy of a config's tree with values put at their paths. Raises UserError for a path that leads nowhere."""
    made = copy.deepcopy(tree)
    for path, value in settings.items():
        *parents, last = path.split(".")
        node: Any = made
        for key in parents:
            node = node.setdefault(key, {}) if isinstance(node, dict) else _entry(node, key, path)
        if isinstance(node, dict):
            node[last] = copy.deepcopy(value)
        else:
            _entry(node, last, path)
            node[int(last)] = copy.deepcopy(value)
    return made


def _entry(node: Any, key: str, path: str) -> Any:
    if isinstance(node, list) and key.isdigit() and int(key) < len(node):
        return node[int(key)]
    what = f"a list of {len(node)} entries, counted from 0" if isinstance(node, list) else "a single value"
    raise UserError(f"{path}: there is no {key} in {what}; set the whole value first, or correct the path")


def _check_space(cell: Cell, path: str, file: StudyFile) -> None:
    """Build the config at both ends of every dimension, the others at their first value. Raises UserError."""
    first = {name: dimension.ends()[0] for name, dimension in cell.space.items()}
    for name, dimension in cell.space.items():
        for value in dimension.ends():
            try:
                config = cell.config({**first, name: value}, file.trial_seeds[0])
            except UserError as error:
                reason = str(error).removeprefix(f"{cell.name}: ")
                raise UserError(f"{path}: {cell.name} with {name}={value}: {reason}") from None
            if file.execution == "in_process" and config.system.world_size != 1:
                raise UserError(
                    f"{path}: execution=in_process runs one rank and {cell.name} has system.world_size="
                    f"{config.system.world_size}; set system.world_size: 1 (batch.virtual_ranks computes the shares of "
                    "several), or execution: run"
                )


def _check_ablations(cells: list[Cell], path: str, file: StudyFile) -> None:
    """Refuse an ablation that fits no cell of the last round. Raises UserError."""
    batches = file.final.batches if file.final and file.final.batches else [next(iter(file.batches))]
    for name, ablation in file.ablations.items():
        reason = None
        for cell in (each for each in cells if each.batch in batches):
            try:
                cell.config({path: each.ends()[0] for path, each in cell.space.items()}, 0, ablation.settings)
                break
            except UserError as error:
                reason = reason or str(error).removeprefix(f"{cell.name}: ")
        else:
            if reason:
                raise UserError(f"{path}: ablations.{name} fits no contestant: {reason}")


def meaning_of(study: Study, cell: Cell) -> dict[str, str]:
    """Hashes of what the trials of a cell depend on, by the part of the study file. Budgets are no part of it."""
    file = study.file
    parts: dict[str, Any] = {
        "base and set": cell.tree,
        "space": {name: dimension.model_dump() for name, dimension in cell.space.items()},
        "target, cap_samples and objective": [
            *(file.target, file.cap_samples, file.objective),
            *([] if file.cap_seconds is None else [file.cap_seconds]),
        ],
        "sampler": file.sampler.model_dump(),
        "pruner": file.pruner.model_dump(),
        "trial_seeds": file.trial_seeds,
    }
    return {name: digest(value) for name, value in parts.items()}


def digest(value: Any) -> str:
    """A short hash of plain values."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()[:16]
