"""The last round: the best points on fresh seeds, ablations of the winner, each run once."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from support.tuning import CAP, SPACE, TARGET, accuracies_of, compute, diverges, made_up, make_study, outcome_of

from bert_fast.config import Config
from bert_fast.errors import UserError
from tuning import final
from tuning.final import FINAL, ablation_runs, final_runs, read_rows, run_part
from tuning.final_rows import FinalRow
from tuning.outcome import Outcome
from tuning.search import Search, best_trial
from tuning.study_file import Study
from tuning.trial import Watch

pytest.importorskip("optuna")
SEEDS = [101, 102, 103]
LAST = {"final": {"seeds": SEEDS}, "ablations": {"short": {"set": {"schedule.warmup_steps": 1}}}}


class Runs:
    """Made-up runs, remembered: LAMB's are worse."""

    def __init__(self) -> None:
        self.configs: list[Config] = []

    def __call__(self, config: Config, watch: Watch) -> Outcome:
        self.configs.append(config)
        assert not watch(outcome_of([0.0]).curve[0]), "nothing is pruned in the last round"
        scale = 1.0 if config.optimizer.name == "adamw" else 0.95
        return outcome_of([scale * each for each in accuracies_of(config)])


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> Runs:
    made = Runs()
    monkeypatch.setattr(final, "runner", lambda _study, _log: made)
    return made


def searched(folder: Path, **changes: Any) -> Study:
    study = make_study(folder, **{**LAST, "trials": 3, **changes})
    compute(Search(study, folder))
    return study


def test_the_best_points_on_all_seeds_then_the_winners_ablations(tmp_path: Path, runs: Runs) -> None:
    study = searched(tmp_path)
    assert run_part(study, tmp_path, 0, 1) == []
    rows = read_rows(tmp_path)
    key = [(row.contestant, row.ablation, row.seed) for row in rows]
    assert key == [
        *((contestant, None, seed) for seed in SEEDS for contestant in ("adamw", "lamb")),
        *(("adamw", "short", seed) for seed in SEEDS),
    ]
    search = Search(study, tmp_path)
    for cell in study.cells:
        best = best_trial(search.trials(cell))
        assert best is not None
        assert best.value == min(each.value for each in search.trials(cell))
        for row in rows:
            if row.contestant == cell.contestant:
                assert (row.point, row.trial) == (best.params, best.number)
    assert [config.train.seed for config in runs.configs] == [row.seed for row in rows]
    assert {config.schedule.warmup_steps for config in runs.configs[6:]} == {1}
    assert run_part(study, tmp_path, 0, 1) == []
    assert len(runs.configs) == 9, "what is there is not run again"


def test_an_ablation_of_each_contestant_that_can_have_it(tmp_path: Path, runs: Runs) -> None:
    """AdamW has no trust ratio."""
    changes = {
        "all_short": {"of": "each", "set": {"schedule.warmup_steps": 1}},
        "one_ratio": {"of": "each", "set": {"optimizer.trust": "global"}},
    }
    study = searched(tmp_path, ablations=changes)
    assert run_part(study, tmp_path, 0, 1) == []
    rows = [row for row in read_rows(tmp_path) if row.ablation]
    assert all(row.outcome is not None for row in rows)
    assert Counter((row.contestant, row.ablation) for row in rows) == {
        ("adamw", "all_short"): 3, ("lamb", "all_short"): 3, ("lamb", "one_ratio"): 3,
    }  # fmt: skip


def test_parts_make_the_whole_and_ablations_wait_for_the_winner(tmp_path: Path, runs: Runs) -> None:
    study = searched(tmp_path)
    assert len(run_part(study, tmp_path, 0, 2)) == 3
    assert {row.ablation for row in read_rows(tmp_path)} == {None}
    assert run_part(study, tmp_path, 1, 2) == []
    assert run_part(study, tmp_path, 0, 2) == []
    counts = Counter((row.contestant, row.ablation, row.seed) for row in read_rows(tmp_path))
    assert len(counts) == 9
    assert set(counts.values()) == {1}


def test_ablations_can_be_left_for_when_all_workers_are_done(tmp_path: Path, runs: Runs) -> None:
    study = searched(tmp_path)
    assert run_part(study, tmp_path, 0, 1, ablations=False) == []
    assert {row.ablation for row in read_rows(tmp_path)} == {None}
    assert [run_part(study, tmp_path, part, 2) for part in (0, 1)] == [[], []]
    assert len(read_rows(tmp_path)) == 9


def test_a_better_point_that_is_found_later_is_run_on_all_seeds(tmp_path: Path, runs: Runs) -> None:
    """Else some seeds of a contestant would be of another point than the rest."""
    study = searched(tmp_path, trials=1)
    run_part(study, tmp_path, 0, 1)
    first = {row.contestant: row.trial for row in read_rows(tmp_path)}
    more = searched(tmp_path, trials=6)
    run_part(more, tmp_path, 0, 1)
    last = {row.contestant: row.trial for row in read_rows(tmp_path)}
    assert first != last
    changed = [name for name in last if first[name] != last[name]]
    seeds = {(r.contestant, r.seed) for r in read_rows(tmp_path) if not r.ablation and r.trial == last[r.contestant]}
    assert seeds == {(name, seed) for name in ("adamw", "lamb") for seed in SEEDS}
    assert changed


def test_all_points_are_stretched_alike(tmp_path: Path, runs: Runs) -> None:
    """Those that came to the target in the search as well: else a miss could count as less than a longer run that reaches."""
    study = make_study(tmp_path, **{**LAST, "final": {"seeds": [1], "stretch": 2.5}, "trials": 1})
    search = Search(study, tmp_path)
    compute(search, lambda config, watch: outcome_of([0.31 if config.optimizer.name == "adamw" else 0.2]))
    reached, missed = final_runs(study, search)
    assert (reached.stretch, missed.stretch) == (2.5, 2.5)
    plain, longer = study.cells[1].config(missed.point, 1), missed.config()
    assert longer.schedule.total_steps == round(2.5 * plain.schedule.total_steps)
    assert longer.train.max_steps == 250 == 2.5 * plain.train.max_steps
    assert longer.schedule.warmup_steps == plain.schedule.warmup_steps


def test_a_miss_counts_by_the_stretched_cap(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    study = searched(tmp_path, final={"seeds": [1], "stretch": 2.5}, trials=1)
    monkeypatch.setattr(final, "runner", lambda _study, _log: lambda _config, _watch: outcome_of([0.15]))
    run_part(study, tmp_path, 0, 1)
    line = json.loads((tmp_path / FINAL).read_text(encoding="utf-8").splitlines()[0])
    assert line["stretch"] == 2.5
    assert line["outcome"]["value"] == pytest.approx(2.5 * CAP * 1.5)


def test_diverged_and_failed_runs_are_rows_and_do_not_win(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    study = searched(tmp_path)

    def run(config: Config, watch: Watch) -> Outcome:
        if config.optimizer.name == "adamw" and config.train.seed == 101:
            return diverges(config, watch)
        if config.train.seed == 102:
            raise OSError("no\nspace")
        return made_up(config, watch)

    monkeypatch.setattr(final, "runner", lambda _study, _log: run)
    assert len(run_part(study, tmp_path, 0, 1)) == 2
    rows = read_rows(tmp_path)
    by_key = {(row.contestant, row.ablation, row.seed): row for row in rows}
    assert by_key["adamw", None, 101].error == "the loss is not finite at step 30"
    diverged = by_key["adamw", None, 101].outcome
    assert diverged is not None
    assert diverged.value(TARGET, CAP) == (2 * CAP, True), "a result, the worst"
    assert by_key["adamw", None, 102].error == "OSError: no space"
    assert by_key["adamw", None, 102].outcome is None
    assert {row.ablation for row in rows} == {None}, "the winner is not known"

    monkeypatch.setattr(final, "runner", lambda _study, _log: made_up)
    assert run_part(study, tmp_path, 0, 1) == []
    again = [row for row in read_rows(tmp_path)[len(rows) :] if row.ablation is None]
    assert {(row.contestant, row.seed) for row in again} == {("adamw", 102), ("lamb", 102)}, "what failed is run again"


def test_a_winner_has_all_its_seeds(tmp_path: Path) -> None:
    """A missing outcome counts as the worst."""
    study = searched(tmp_path)
    search = Search(study, tmp_path)
    rows = [
        FinalRow(
            run.cell.contestant, "all", 64, None, run.seed, run.trial, run.point, {}, run.stretch, "",
            outcome_of([0.31] if run.cell.contestant == "adamw" else [0.2, 0.31]), "",
        )
        for run in final_runs(study, search)
    ]  # fmt: skip
    assert {run.cell.contestant for run in ablation_runs(study, search, rows)} == {"adamw"}
    rows[0] = replace(rows[0], outcome=None)
    assert rows[0].contestant == "adamw"
    assert {run.cell.contestant for run in ablation_runs(study, search, rows)} == {"lamb"}


def test_a_line_that_was_cut_off_is_run_again(tmp_path: Path, runs: Runs) -> None:
    study = searched(tmp_path)
    run_part(study, tmp_path, 0, 1)
    path = tmp_path / FINAL
    whole = path.read_text(encoding="utf-8")
    path.write_text(whole[:-30], encoding="utf-8")
    run_part(study, tmp_path, 0, 1)
    assert len(runs.configs) == 10
    again = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    assert again == [json.loads(line) for line in whole.splitlines()]
    path.write_text("no json\n" + whole, encoding="utf-8")
    with pytest.raises(UserError, match="remove the line"):
        read_rows(tmp_path)


def test_a_signal_leaves_whole_lines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    study = searched(tmp_path)
    done: list[int] = []

    def run(config: Config, watch: Watch) -> Outcome:
        if len(done) == 2:
            raise KeyboardInterrupt
        done.append(config.train.seed)
        return made_up(config, watch)

    monkeypatch.setattr(final, "runner", lambda _study, _log: run)
    with pytest.raises(KeyboardInterrupt):
        run_part(study, tmp_path, 0, 1)
    assert len(read_rows(tmp_path)) == 2


def test_no_complete_trial_and_no_final_round(tmp_path: Path) -> None:
    study = make_study(tmp_path, **LAST)
    search = Search(study, tmp_path)
    with pytest.raises(UserError, match="no complete trial yet") as error:
        final_runs(study, search)
    assert "\n" not in str(error.value)
    with search.alive():
        task = search.next_task()
        assert task is not None
        search.finish(task, replace(outcome_of([0.31]), diverged=True), "the loss is not finite")
    with pytest.raises(UserError, match="no complete trial yet"):
        run_part(study, tmp_path, 0, 1)
    assert not (tmp_path / FINAL).exists()
    plain = make_study(tmp_path)
    with pytest.raises(UserError, match="has no final round"):
        final_runs(plain, Search(plain, tmp_path))


def test_only_the_batches_of_the_last_round(tmp_path: Path) -> None:
    batches = {64: {}, 512: {"set": {"batch.gradient_accumulation_steps": 8}}}
    contestants = {"adamw": {"set": {"optimizer.name": "adamw"}, "space": SPACE}}
    study = searched(tmp_path, batches=batches, contestants=contestants, trials=1)
    assert {run.cell.batch for run in final_runs(study, Search(study, tmp_path))} == {64}
    wide = make_study(
        tmp_path, batches=batches, contestants=contestants, trials=1, final={"seeds": [1], "batches": [512, 64]}
    )
    assert {run.cell.batch for run in final_runs(wide, Search(wide, tmp_path))} == {64, 512}
