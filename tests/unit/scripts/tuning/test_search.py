"""The trials of a search on one journal: fair, repeatable, and not lost with the worker that computed them."""

from __future__ import annotations

import os
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from support.tuning import CAP, SPACE, compute, diverges, made_up, make_study, next_task, outcome_of

from bert_fast.errors import UserError
from tuning import search as search_module
from tuning.journal import JOURNAL
from tuning.outcome import CurvePoint
from tuning.search import CHOICE, WORKERS, Search, best_trial
from tuning.study_file import Study
from tuning.trial import DivergedError

optuna = pytest.importorskip("optuna")
TrialState = optuna.trial.TrialState
ADAMW = {"set": {"optimizer.name": "adamw"}, "space": SPACE}


def trials(search: Search, study: Study, cell: int = 0) -> list[Any]:
    return search.trials(study.cells[cell])


def files_in(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


class Worker(Search):
    """Another worker in this process: alive until it is `gone`."""

    def __init__(self, study: Study, folder: Path, name: str) -> None:
        super().__init__(study, folder)
        self.worker = name
        self.file = folder / WORKERS / name
        self.file.touch()

    def gone(self) -> None:
        """As kill -9 leaves it: the file stays and gets old."""
        os.utime(self.file, (1, 1))


# ---- fairness ---------------------------------------------------------------------------------------------------------


def test_contestants_with_one_space_get_the_same_points_and_seeds(tmp_path: Path) -> None:
    study = make_study(tmp_path)
    search = Search(study, tmp_path)
    tasks = compute(search)
    by_cell = {cell.name: [task for task in tasks if task.cell is cell] for cell in study.cells}
    adamw, lamb = by_cell.values()
    assert [task.seed for task in adamw] == [task.seed for task in lamb] == [11, 12, 13, 11]
    assert [task.point for task in adamw[:3]] == [task.point for task in lamb[:3]], "startup"
    assert len({str(task.point) for task in adamw}) == 4
    assert [search.num_counted(cell) for cell in study.cells] == [4, 4]
    assert search.is_complete


def test_all_contestants_advance_together_and_batches_in_order(tmp_path: Path) -> None:
    batches = {512: {"trials": 2, "set": {"batch.gradient_accumulation_steps": 8}}, 64: {}}
    study = make_study(tmp_path, variants={"a": {}, "b": {}}, batches=batches)
    tasks = compute(Search(study, tmp_path))
    assert [task.cell.batch for task in tasks] == 8 * [512] + 16 * [64]
    begun: Counter[str] = Counter()
    for task in tasks:
        begun[task.cell.name] += 1
        counts = [begun[cell.name] for cell in study.cells if cell.batch == task.cell.batch]
        assert max(counts) - min(counts) <= 1


@pytest.mark.parametrize("sampler", [{"kind": "random", "seed": 3}, {"kind": "tpe", "seed": 3, "startup": 3}])
def test_one_worker_gives_the_same_search_again(tmp_path: Path, sampler: dict[str, Any]) -> None:
    found = []
    for name in ("one", "two"):
        study = make_study(tmp_path, sampler=sampler, trials=5)
        tasks = compute(Search(study, tmp_path / name))
        found.append([(task.name, task.point, task.seed) for task in tasks])
    assert found[0] == found[1]
    other = make_study(tmp_path, sampler={**sampler, "seed": 4}, trials=1)
    assert compute(Search(other, tmp_path / "three"))[0].point != found[0][0][1]


def test_the_estimator_learns(tmp_path: Path) -> None:
    """After its startup it draws points that are better than random ones."""
    values: dict[str, float] = {}
    for kind in ("tpe", "random"):
        sampler = {"kind": kind, "seed": 1, "startup": 5}
        study = make_study(tmp_path, trials=16, sampler=sampler, contestants={"adamw": ADAMW})
        search = Search(study, tmp_path / kind)
        compute(search)
        late = [each.value for each in trials(search, study)[8:]]
        values[kind] = sum(late) / len(late)
    assert values["tpe"] < 0.95 * values["random"]


def test_workers_share_the_budget(tmp_path: Path) -> None:
    """Three at once, interleaved: every number once, no more than the budget, nobody waits."""
    study = make_study(tmp_path)
    workers = [Worker(study, tmp_path, f"w{number}") for number in range(3)]
    tasks: dict[Worker, Any] = {}
    names = []
    for turn in range(12):
        worker = workers[turn % 3]
        if (task := tasks.pop(worker, None)) is not None:
            config = task.cell.config(task.point, task.seed)
            assert worker.finish(task, made_up(config, worker.watcher(task)), None)
        if (task := worker.next_task()) is not None:
            names.append(task.name)
            tasks[worker] = task
    assert tasks == {}
    assert sorted(names) == sorted({f"{cell.name} trial {number}" for cell in study.cells for number in range(4)})
    assert workers[0].is_complete


# ---- lost trials --------------------------------------------------------------------------------------------------------


def test_a_dead_workers_trial_is_tried_again_at_its_point_with_its_seed(tmp_path: Path) -> None:
    study = make_study(tmp_path)
    whole = compute(Search(study, tmp_path / "whole"))
    dead = Worker(study, tmp_path, "dead")
    lost = next_task(dead)
    alive = Worker(study, tmp_path, "alive")
    first = next_task(alive)
    assert first.cell is not lost.cell, "the other one's trial is not given up while it lives"
    alive.finish(first, outcome_of([0.2]), None)
    dead.gone()
    tasks = compute(alive)
    again = [task for task in tasks if task.point == lost.point and task.cell is lost.cell]
    assert len(again) == 1
    assert again[0].seed == lost.seed
    assert [alive.num_counted(cell) for cell in study.cells] == [4, 4]
    assert alive.is_complete
    states = Counter(each.state for each in trials(alive, study))
    assert states == {TrialState.COMPLETE: 4, TrialState.FAIL: 1}
    # Seeds and startup points are those of a search in which nobody died
    drawn = {cell.name: [task for task in whole if task.cell.name == cell.name] for cell in study.cells}
    for cell in study.cells:
        found = [task for task in [first, *tasks] if task.cell.name == cell.name]
        assert Counter(task.seed for task in found) == Counter(task.seed for task in drawn[cell.name])
        assert {str(task.point) for task in found} >= {str(task.point) for task in drawn[cell.name][:3]}


def test_the_last_trial_of_a_budget_is_tried_again_too(tmp_path: Path) -> None:
    study = make_study(tmp_path, trials=1)
    dead = Worker(study, tmp_path, "dead")
    lost = [next_task(dead)]
    dead.finish(lost[0], outcome_of([0.1]), None)
    lost.append(next_task(dead))
    other = Worker(study, tmp_path, "other")
    assert other.next_task() is None
    assert not other.is_complete
    assert "2 of 2 trials" in other.progress()
    assert "1 not ended" in other.progress()
    dead.gone()
    (again,) = compute(other)
    assert (again.cell, again.point, again.seed) == (lost[1].cell, lost[1].point, lost[1].seed)
    assert other.is_complete
    assert "not ended" not in other.progress()


def test_a_worker_that_died_before_it_drew_its_point(tmp_path: Path) -> None:
    study = make_study(tmp_path, trials=2, trial_seeds=[5, 6])
    whole = compute(Search(study, tmp_path / "whole"))
    search = Worker(study, tmp_path, "worker")
    optuna.load_study(study_name=study.cells[0].name, storage=search._storage).ask()
    tasks = compute(search)
    assert search.is_complete
    key = [(task.cell.name, str(task.point), task.seed) for task in whole]
    assert sorted((task.cell.name, str(task.point), task.seed) for task in tasks) == sorted(key)


def test_a_trial_that_is_lost_again_and_again(tmp_path: Path) -> None:
    study = make_study(tmp_path, trials=1)
    points = []
    for number in range(3):
        worker = Worker(study, tmp_path, f"dead{number}")
        task = next_task(worker)
        points.append((task.cell.name, task.point, task.seed))
        worker.gone()
    assert points[0] == points[1] == points[2] or {name for name, *_ in points} == {cell.name for cell in study.cells}
    last = Worker(study, tmp_path, "last")
    compute(last)
    assert last.is_complete
    for cell in study.cells:
        assert sum(each.state is TrialState.COMPLETE for each in last.trials(cell)) == 1


def test_a_worker_whose_number_was_used_before(tmp_path: Path) -> None:
    """In a container every start may have the same process number: what its name has running is not its own."""
    study = make_study(tmp_path, trials=1)
    lost = next_task(Worker(study, tmp_path, "host-7"))
    again = Worker(study, tmp_path, "host-7")
    assert any(task.point == lost.point and task.cell.name == lost.cell.name for task in compute(again))
    assert again.is_complete


def test_a_silent_worker_that_comes_back(tmp_path: Path) -> None:
    """Another has its trial by then; its own result is dropped, and nothing is counted twice."""
    study = make_study(tmp_path, trials=1)
    silent, other = Worker(study, tmp_path, "silent"), Worker(study, tmp_path, "other")
    task = next_task(silent)
    watch = silent.watcher(task)
    assert not watch(CurvePoint(1600, 1.0, 0.2))
    silent.gone()
    compute(other)
    assert watch(CurvePoint(3200, 2.0, 0.3)), "its run ends"
    assert not silent.finish(task, outcome_of([0.3]), None)
    assert not silent.fail(task, "late")
    silent.abandon(task)
    assert silent.next_task() is None
    assert other.is_complete
    assert [search.num_counted(cell) for search in (silent, other) for cell in study.cells] == [1, 1, 1, 1]


def test_a_trial_that_is_given_back(tmp_path: Path) -> None:
    study = make_study(tmp_path)
    search = Search(study, tmp_path)
    with search.alive():
        task = next_task(search)
        search.abandon(task)
    rest = compute(Search(study, tmp_path))
    assert len(rest) == 8
    assert (task.point, task.seed) in [(each.point, each.seed) for each in rest]


def test_the_file_of_a_worker_lives_with_it(tmp_path: Path) -> None:
    search = Search(make_study(tmp_path), tmp_path)
    with search.alive():
        assert (tmp_path / WORKERS / search.worker).exists()
    assert not (tmp_path / WORKERS / search.worker).exists()


# ---- how trials end -----------------------------------------------------------------------------------------------------


def test_a_diverged_trial_is_a_result_and_never_the_best(tmp_path: Path) -> None:
    study = make_study(tmp_path, trials=2)
    search = Search(study, tmp_path)
    with search.alive():
        diverged = next_task(search)
        with pytest.raises(DivergedError) as error:
            diverges(diverged.cell.config(diverged.point, diverged.seed), search.watcher(diverged))
        search.finish(diverged, error.value.outcome, str(error.value))
        assert best_trial(trials(search, study)) is None
    compute(search, lambda config, watch: outcome_of([0.0001]))
    states = [each.state for each in trials(search, study)]
    assert states == [TrialState.COMPLETE, TrialState.COMPLETE]
    first, second = trials(search, study)
    assert first.value == 2 * CAP > second.value
    assert first.user_attrs["outcome"]["censored"]
    best = best_trial([first, second])
    assert best is not None
    assert best.number == 1


def test_a_failed_trial_costs_its_cell_one(tmp_path: Path) -> None:
    study = make_study(tmp_path, trials=2)
    search = Search(study, tmp_path)
    with search.alive():
        search.fail(next_task(search), "OSError: no")
    tasks = compute(search)
    assert [task.cell.name for task in tasks].count(study.cells[0].name) == 1
    assert search.is_complete
    assert trials(search, study)[0].user_attrs["error"] == "OSError: no"
    best = best_trial(trials(search, study))
    assert best is not None
    assert best.number == 1


def prune_point(study: Study, folder: Path, before: list[list[float]], curve: list[float]) -> int | None:
    """After which evaluation a curve is pruned, given those of the trials before it."""
    search = Search(study, folder)
    with search.alive():
        for accuracies in before:
            task = next_task(search)
            watch = search.watcher(task)
            for point in outcome_of(accuracies).curve:
                watch(point)
            search.finish(task, outcome_of(accuracies), None)
        watch = search.watcher(next_task(search))
        return next((n for n, point in enumerate(outcome_of(curve).curve, 1) if watch(point)), None)


GOOD = [[0.10, 0.20, 0.30, 0.31], [0.11, 0.21, 0.29, 0.32], [0.12, 0.22, 0.28, 0.33]]


@pytest.mark.parametrize(
    ("pruner", "curve", "expected"),
    [
        ({"kind": "none"}, [0.0, 0.0, 0.0, 0.0], None),
        ({"kind": "median", "startup": 3, "min_evaluations": 2}, [0.05, 0.05, 0.05, 0.05], 2),
        ({"kind": "median", "startup": 3, "min_evaluations": 3}, [0.05, 0.05, 0.05, 0.05], 3),
        ({"kind": "median", "startup": 4, "min_evaluations": 2}, [0.05, 0.05, 0.05, 0.05], None),
        ({"kind": "median", "startup": 3, "min_evaluations": 2}, [0.05, 0.215, 0.295, 0.325], None),
        ({"kind": "median", "startup": 3, "min_evaluations": 2}, [0.05, 0.23, 0.1, 0.1], 3),
        ({"kind": "median", "startup": 3, "min_evaluations": 2}, [0.05, 0.31, 0.1, 0.1], None),
        ({"kind": "halving", "min_evaluations": 2, "reduction_factor": 2}, [0.05, 0.05, 0.05, 0.05], 2),
        ({"kind": "halving", "min_evaluations": 2, "reduction_factor": 2}, [0.05, 0.23, 0.31, 0.34], None),
        ({"kind": "halving", "min_evaluations": 2, "reduction_factor": 2}, [0.30, 0.05, 0.31, 0.34], None),
    ],
)
def test_pruning(tmp_path: Path, pruner: dict[str, Any], curve: list[float], expected: int | None) -> None:
    """By the best accuracy so far, which is what the search ranks; at the cap, a trial is over and is not pruned."""
    study = make_study(tmp_path, trials=9, pruner=pruner, contestants={"adamw": ADAMW})
    assert prune_point(study, tmp_path, GOOD, curve) == expected


def test_a_pruned_trial_is_recorded_as_one(tmp_path: Path) -> None:
    study = make_study(tmp_path, trials=6, pruner={"kind": "median", "startup": 2, "min_evaluations": 2})
    search = Search(study, tmp_path)
    compute(search)
    states = Counter(each.state for cell in study.cells for each in search.trials(cell))
    assert states[TrialState.PRUNED] > 0
    assert sum(states.values()) == 12
    pruned = next(each for each in trials(search, study) if each.state is TrialState.PRUNED)
    assert len(pruned.user_attrs["outcome"]["curve"]) < 4
    best = best_trial(trials(search, study))
    assert best is not None
    assert best.state is TrialState.COMPLETE


# ---- the journal ---------------------------------------------------------------------------------------------------------


def test_trials_and_contestants_are_added_later(tmp_path: Path) -> None:
    study = make_study(tmp_path, trials=2)
    compute(Search(study, tmp_path))
    more = {name: {"set": {"optimizer.name": name}, "space": SPACE} for name in ("adamw", "lamb", "nadamw")}
    wider = make_study(tmp_path, trials=3, contestants=more)
    search = Search(wider, tmp_path)
    tasks = compute(search)
    assert Counter(task.cell.contestant for task in tasks) == {"adamw": 1, "lamb": 1, "nadamw": 3}
    assert [task.cell.contestant for task in tasks[:2]] == ["nadamw", "nadamw"], "the one that is behind"
    first = [search.trials(cell)[0] for cell in wider.cells]
    assert first[0].params == first[1].params == first[2].params
    fewer = Search(make_study(tmp_path, trials=1), tmp_path)
    assert compute(fewer) == []
    assert fewer.is_complete


@pytest.mark.parametrize(
    ("part", "changes"),
    [
        ("study", {"name": "other"}),
        ("sampler", {"sampler": {"seed": 1}}),
        ("base and set", {"set": {"system.world_size": 1, "batch.micro_batch_size": 32, "batch.virtual_ranks": 2}}),
    ],
)
def test_a_journal_of_another_study(tmp_path: Path, part: str, changes: dict[str, Any]) -> None:
    """Refused, and left as it is, also where cells come first that are in no journal yet."""
    compute(Search(make_study(tmp_path, trials=1), tmp_path / "out"))
    before = files_in(tmp_path / "out")
    contestants = {name: {"set": {"optimizer.name": name}, "space": SPACE} for name in ("nadamw", "adamw")}
    with pytest.raises(UserError) as error:
        Search(make_study(tmp_path, contestants=contestants, **changes), tmp_path / "out")
    other = "study" if part == "study" else f"another study: adamw/all/64 was searched with another {part}"
    assert f"is of {'the study small' if part == 'study' else other}" in str(error.value)
    assert "\n" not in str(error.value)
    assert files_in(tmp_path / "out") == before


@pytest.mark.parametrize(
    "damage",
    [
        b"\x00\xff\xfe garbage\nmore\n", b"{}\n{}\n", b"[]\n", b"3\n", b'{"op_code": 99}\n', b'{"op_code": 0}\n',
        b"\x80\x80\n{}\n",
    ],
)  # fmt: skip
def test_a_damaged_journal(tmp_path: Path, damage: bytes) -> None:
    study = make_study(tmp_path)
    (tmp_path / JOURNAL).write_bytes(damage)
    with pytest.raises(UserError, match=JOURNAL) as error:
        Search(study, tmp_path)
    assert "\n" not in str(error.value)
    assert (tmp_path / JOURNAL).read_bytes() == damage


def test_a_journal_with_a_line_destroyed(tmp_path: Path) -> None:
    study = make_study(tmp_path, trials=1)
    compute(Search(study, tmp_path))
    lines = (tmp_path / JOURNAL).read_bytes().splitlines(keepends=True)
    (tmp_path / JOURNAL).write_bytes(b"".join([*lines[:5], b"\x00" * 40 + b"\n", *lines[6:]]))
    with pytest.raises(UserError, match=JOURNAL):
        Search(study, tmp_path)


@pytest.mark.filterwarnings("ignore:The value of `grace_period`")
def test_the_locks_of_a_dead_worker_are_broken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also under a relative path, from which Optuna could not tell the age of a lock."""
    monkeypatch.setattr(search_module, "SILENT_S", 1)
    monkeypatch.chdir(tmp_path)
    study = make_study(tmp_path, trials=1)
    compute(Search(study, Path("out")))
    for name in (CHOICE, JOURNAL):
        (tmp_path / "out" / f"{name}.lock").symlink_to(tmp_path / "out" / name)
    assert Search(study, Path("out")).is_complete


def test_a_line_of_the_journal_that_was_cut_off_costs_that_line_alone(tmp_path: Path) -> None:
    study = make_study(tmp_path, trials=2)
    compute(Search(study, tmp_path))
    path = tmp_path / JOURNAL
    path.write_bytes(path.read_bytes()[:-20])
    again = make_study(tmp_path, trials=4)
    search = Search(again, tmp_path)
    compute(search)
    assert Search(again, tmp_path).num_counted(again.cells[0]) == 4


def test_a_run_that_misses_in_little_time_is_not_the_best(tmp_path: Path) -> None:
    """With seconds for samples, a miss counts as cap_seconds and more."""
    study = make_study(tmp_path, trials=2, objective="seconds", cap_seconds=100.0, contestants={"adamw": ADAMW})
    search = Search(study, tmp_path)
    ends = iter([[0.1], [0.2, 0.25, 0.31]])
    compute(search, lambda config, watch: outcome_of(next(ends)))
    values = [each.value for each in search.trials(study.cells[0])]
    assert values[0] == pytest.approx(100 * (1 + 0.2 / 0.3))
    assert values[1] is not None
    assert values[1] < 3
