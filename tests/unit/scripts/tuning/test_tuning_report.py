"""The report of a search, from journals that Optuna has written."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Sequence
from html.parser import HTMLParser
from itertools import product
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import pytest
import yaml
from support.paths import ROOT

from bert_fast.errors import UserError
from tuning.outcome import CurvePoint, Outcome
from tuning.report import write_report
from tuning.report.paired import compare, paired_p, sign_flip_p
from tuning.study_file import Study, read_study

optuna = pytest.importorskip("optuna")
from optuna.storages import JournalStorage  # noqa: E402
from optuna.storages.journal import JournalFileBackend  # noqa: E402

TARGET, CAP = 0.3, 32_000
SPACE = {"optimizer.lr": {"low": 1e-4, "high": 1e-2, "log": True}, "optimizer.weight_decay": {"low": 0.0, "high": 0.1}}


def study_of(folder: Path, **changes: Any) -> Study:
    """A study of two contestants, two variants and two batches, 3 trials a cell."""
    file = {
        "name": "small",
        "base": str(ROOT / "configs/mini_cpu.yaml"),
        "set": {"system.world_size": 1, "batch.micro_batch_size": 64},
        "target": TARGET,
        "cap_samples": CAP,
        "trials": 3,
        "trial_seeds": [1, 2, 3],
        "contestants": {name: {"set": {"optimizer.name": name}, "space": SPACE} for name in ("adamw", "lamb")},
        "variants": {
            "before": {"set": {"communication.clip": "bucket_before_reduce"}},
            "after": {"set": {"communication.clip": "global_after_reduce"}},
        },
        "batches": {64: {}, 512: {"set": {"batch.gradient_accumulation_steps": 8}}},
        "final": {"seeds": [11, 12, 13]},
    }
    path = folder / "study.yaml"
    path.write_text(yaml.safe_dump(file | changes, sort_keys=False), encoding="utf-8")
    return read_study(path)


def outcome(samples: float, best: float = 0.31) -> Outcome:
    """A run whose accuracy is 0.2 at first and passes 0.3 at `samples`, or ends at `best` below it."""
    if best < TARGET:
        curve = [CurvePoint(2000, 1.0, 0.2), CurvePoint(CAP, 9.0, best)]
    else:
        curve = [CurvePoint(2000, 1.0, 0.2), CurvePoint(int(2 * samples) - 2000, 9.0, 0.4)]
    return Outcome(curve, steps=100, samples=curve[-1].samples, seconds=9.0, step_ms=20.0, optimizer_ms=5.0)


class Journal:
    """A journal of a search, written with Optuna itself."""

    def __init__(self, folder: Path) -> None:
        self._storage = JournalStorage(JournalFileBackend(str(folder / "journal.log")))
        self._studies: dict[str, optuna.Study] = {}

    def add(
        self, cell: str, state: str, result: Outcome | None = None, lr: float = 1e-3, seed: int = 1, **more: Any
    ) -> None:
        """A trial that has ended."""
        if cell not in self._studies:
            self._studies[cell] = optuna.create_study(storage=self._storage, study_name=cell, direction="minimize")
        attributes = {"seed": seed, "processor": "A processor", **more}
        if result is not None:
            attributes["outcome"] = result.record(TARGET, CAP)
        ranges = optuna.distributions.FloatDistribution
        self._studies[cell].add_trial(
            optuna.trial.create_trial(
                state=optuna.trial.TrialState[state],
                value=result.value(TARGET, CAP)[0] if result is not None and state == "COMPLETE" else None,
                params={"optimizer.lr": lr, "optimizer.weight_decay": 0.05},
                distributions={
                    "optimizer.lr": ranges(1e-4, 1e-2, log=True),
                    "optimizer.weight_decay": ranges(0.0, 0.1),
                },
                user_attrs=attributes,
            )
        )


def cells_of(study: Study) -> list[str]:
    return [cell.name for cell in study.cells]


def fill(journal: Journal, study: Study, best: float = 0.31) -> None:
    """Three complete trials for each cell: adamw needs 20,000, 18,000 and 22,000 samples, every other 10 % less."""
    for cell in study.cells:
        factor = 1.0 if cell.contestant == "adamw" else 0.9
        for seed, samples in enumerate((20_000, 18_000, 22_000), 1):
            journal.add(cell.name, "COMPLETE", outcome(factor * samples, best), lr=samples / 1e7, seed=seed)


def final_row(cell: str, seed: int, result: Outcome | None, ablation: str | None = None, **more: Any) -> dict[str, Any]:
    contestant, variant, batch = cell.split("/")
    return {
        "round": "ablation" if ablation else "final",
        "contestant": contestant,
        "variant": variant,
        "batch": int(batch),
        "ablation": ablation,
        "seed": seed,
        "trial": 1,
        "stretch": 1.0,
        "point": {"optimizer.lr": 0.0018},
        "settings": {"schedule.warmup_steps": 1} if ablation else {},
        "processor": "A processor",
        "outcome": None if result is None else result.record(TARGET, CAP),
        "error": None,
    } | more


def write_finals(folder: Path, rows: Sequence[dict[str, Any]], end: str = "") -> None:
    (folder / "final.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + end, encoding="utf-8")


class Page(HTMLParser):
    """What a reader of the page sees, and what it would load."""

    def __init__(self, source: str) -> None:
        super().__init__()
        self.text, self.loads = "", list[str]()
        self.feed(source)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.loads += [tag for name, _ in attrs if name in ("src", "href", "xlink:href", "srcset")]
        self.loads += [tag for _ in "x" if tag in ("script", "link", "iframe")]

    def handle_data(self, data: str) -> None:
        self.text += data


def written(study: Study, folder: Path) -> tuple[dict[str, Any], str, str]:
    """The record, the Markdown without its alignment, and the page's text."""
    write_report(study, folder)
    source = (folder / "report.html").read_text(encoding="utf-8")
    page = Page(source)
    assert page.loads == []
    assert "prefers-color-scheme: dark" in source
    markdown = (folder / "report.md").read_text(encoding="utf-8").replace("\\", "")
    return json.loads((folder / "tune.json").read_text(encoding="utf-8")), re.sub(r" +", " ", markdown), page.text


def part(markdown: str, title: str) -> str:
    return markdown.split(f"## {title}")[1].split("\n## ")[0]


def test_whole_report(tmp_path: Path) -> None:
    study = study_of(tmp_path)
    fill(Journal(tmp_path), study)
    adamw, lamb = (20_000, 21_000, 25_000), (18_000, 20_000, 21_000)
    rows = []
    for variant, more in (("before", 0), ("after", 5000)):
        rows += [
            final_row(f"adamw/{variant}/64", s, outcome(n + more)) for s, n in zip((11, 12, 13), adamw, strict=True)
        ]
        rows += [final_row(f"lamb/{variant}/64", s, outcome(n + more)) for s, n in zip((11, 12, 13), lamb, strict=True)]
    rows += [final_row("lamb/before/64", s, outcome(2 * n), "no_warmup") for s, n in zip((11, 12), lamb, strict=False)]
    write_finals(tmp_path, rows)

    record, markdown, page = written(study, tmp_path)

    metrics = record["metrics"]
    assert metrics["trials/adamw"] == metrics["trials/lamb"] == 12
    assert metrics["samples_to_target/lamb/mean"] == pytest.approx(mean(lamb), rel=1e-6)
    assert metrics["samples_to_target/lamb/stdev"] == pytest.approx(stdev(lamb), rel=1e-6)
    assert (metrics["samples_to_target/lamb/n"], metrics["samples_to_target/lamb/reached"]) == (3, 3)
    assert metrics["ratio_to_adamw/lamb"] == pytest.approx(sum(lamb) / sum(adamw))
    assert metrics["ratio_to_adamw/adamw"] == 1
    assert set(record) == {"metrics", "config", "environment", "samples"}
    assert record["config"]["sources"]["lamb"] == "final round of lamb/before/64"
    assert all(isinstance(value, int | float) for value in metrics.values())

    assert "All contestants had the same budget" in markdown
    assert "No trial reached" not in markdown
    to_target = part(markdown, "Final round").split("### Samples to 0.3\n")[1].split("###")[0]
    assert f"| lamb/before/64 | 19,667 | 1,528 | 3 | 3 | {sum(lamb) / sum(adamw):.3f} | 3 | 0.25 |" in to_target
    factor = "| lamb/before/64 no_warmup | schedule.warmup_steps=1 | 38,000 | 2,828 | 2 | 2 | 2.000 | 2 | 0.5 |"
    assert factor in part(markdown, "Ablations")
    assert "| lamb/after/512 | 1 | 16,200 | 0.0018 | 0.05 |" in part(markdown, "Best points")
    assert "| adamw/before | 18,000 | 18,000 |" in part(markdown, "Samples to the target against")
    assert "| adamw, batch 64 | 20.00 | 5.00 | 25.0% | 6 |" in part(markdown, "Cost of a step")
    assert "| lamb/before/64 | 18,000 | 16,200 | 16,200 |" in part(markdown, "Best value over trials")
    for title in re.findall(r"^## (.*)$", markdown, re.MULTILINE):
        assert title in page


def test_charts_tell_contestants_by_colour_and_variants_by_dash(tmp_path: Path) -> None:
    study = study_of(tmp_path)
    fill(Journal(tmp_path), study)
    write_report(study, tmp_path)
    source = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert source.count("<svg") == 3  # two batches, and samples against the batch
    lines = re.findall(r'<path class="line ([^"]*)"', source)
    assert sorted(lines) == sorted(["c0", "c0 d1", "c1", "c1 d1"] * 3)
    assert "stroke-dasharray" in source


def test_no_trial_reached_the_target(tmp_path: Path) -> None:
    study = study_of(tmp_path)
    fill(Journal(tmp_path), study, best=0.24)
    record, markdown, page = written(study, tmp_path)
    first = markdown.split("## In short")[1].strip().splitlines()[0]
    assert first.startswith("No trial reached the target 0.3: the best accuracy is 0.2400, of adamw/before/64")
    assert "No trial reached the target" in page
    censored = CAP * (1 + 0.06 / 0.3)
    assert record["metrics"]["samples_to_target/adamw/mean"] == pytest.approx(censored)
    assert record["metrics"]["samples_to_target/adamw/reached"] == 0
    assert f"{censored:,.0f}*" in part(markdown, "Best trials of the search")


def test_without_a_final_round_the_search_is_what_there_is(tmp_path: Path) -> None:
    study = study_of(tmp_path)
    fill(Journal(tmp_path), study)
    record, markdown, _ = written(study, tmp_path)
    assert "There was no final round" in part(markdown, "In short")
    assert "There was no final round" in part(markdown, "Final round")
    metrics = record["metrics"]
    assert metrics["samples_to_target/lamb/mean"] == pytest.approx(16_200)
    assert (metrics["samples_to_target/lamb/n"], metrics["samples_to_target/lamb/stdev"]) == (1, 0)
    assert metrics["ratio_to_adamw/lamb"] == pytest.approx(0.9)
    assert "best trial of the search, lamb/before/64 trial 1" in record["config"]["sources"]["lamb"]


def test_a_chosen_run_is_not_compared_with_fresh_ones(tmp_path: Path) -> None:
    study = study_of(tmp_path)
    fill(Journal(tmp_path), study)
    write_finals(tmp_path, [final_row("adamw/before/64", 11, outcome(20_000))])
    metrics = written(study, tmp_path)[0]["metrics"]
    assert "samples_to_target/lamb/mean" in metrics
    assert "ratio_to_adamw/lamb" not in metrics


def test_failed_pruned_diverged_and_lost_trials(tmp_path: Path) -> None:
    study = study_of(tmp_path, batches={64: {}}, variants={"before": {}}, trials=4)
    journal = Journal(tmp_path)
    journal.add("adamw/before/64", "FAIL", seed=1, error="no <b>memory</b> | left")
    journal.add("adamw/before/64", "PRUNED", outcome(0, best=0.22), seed=2)
    journal.add("adamw/before/64", "COMPLETE", outcome(10_000), seed=3, error="the loss is not finite")
    journal.add("adamw/before/64", "FAIL", seed=1, error="its worker is gone", lost=True)
    journal.add("adamw/before/64", "COMPLETE", outcome(20_000), seed=1)
    for seed in (1, 1, 2, 3):
        journal.add("lamb/before/64", "COMPLETE", outcome(20_000), seed=seed)
    record, markdown, page = written(study, tmp_path)
    assert record["metrics"]["trials/adamw"] == 4
    assert record["metrics"]["samples_to_target/adamw/mean"] == pytest.approx(20_000), (
        "a diverged trial is never the best"
    )
    # wanted, complete, diverged, pruned, failed, lost, open, censored, seeds, evaluations
    assert "| adamw | 4 | 1 | 1 | 1 | 1 | 1 | 0 | 0 | 1, 2, 3 | 6 |" in part(markdown, "Fairness")
    assert "All contestants had the same budget" in markdown
    why = part(markdown, "Trials without a result")
    assert "| adamw/before/64 trial 0 | failed | no &lt;b>memory&lt;/b> | left |" in why
    assert "trial 1" not in why
    assert "no <b>memory</b> | left" in page, "the text is shown, not taken as markup"
    assert "| adamw/before/64 | – | – | 20,000 |" in part(markdown, "Best value over trials")


def test_an_unequal_budget_is_named(tmp_path: Path) -> None:
    study = study_of(tmp_path, batches={64: {}}, variants={"before": {}})
    journal = Journal(tmp_path)
    for seed in (1, 2, 3):
        journal.add("adamw/before/64", "COMPLETE", outcome(20_000), seed=seed)
    journal.add("lamb/before/64", "COMPLETE", outcome(20_000), seed=1)
    markdown = written(study, tmp_path)[1]
    assert "did not have the same budget: lamb/before/64 had 1 trials where others had 3" in markdown
    assert "not finished: lamb/before/64 1 of 3" in markdown

    for seed in (1, 1):
        journal.add("lamb/before/64", "COMPLETE", outcome(20_000), seed=seed)
    assert "did not have the same budget: lamb/before/64 had other trial seeds" in written(study, tmp_path)[1]


def test_a_study_that_has_only_begun(tmp_path: Path) -> None:
    study = study_of(tmp_path)
    Journal(tmp_path).add("adamw/before/64", "FAIL", error="stopped")
    record, markdown, _ = written(study, tmp_path)
    assert record["metrics"] == {"trials/adamw": 1, "trials/lamb": 0}
    assert "No trial reached the target 0.3: none has a result yet." in markdown


def test_final_runs_that_failed_or_were_censored_or_cut_off(tmp_path: Path) -> None:
    study = study_of(tmp_path)
    fill(Journal(tmp_path), study)
    rows = [
        final_row("adamw/before/64", 11, outcome(30_000)),
        final_row("adamw/before/64", 11, outcome(20_000)),  # done again: counts instead of the first
        final_row("adamw/before/64", 12, outcome(0, best=0.27)),
        final_row("adamw/before/64", 13, None, error="out of memory", point={"optimizer.lr": 0.5}),
    ]
    write_finals(tmp_path, rows, end='{"round": "fin')
    record, markdown, _ = written(study, tmp_path)
    values = (20_000, CAP * 1.1)
    assert record["metrics"]["samples_to_target/adamw/mean"] == pytest.approx(mean(values))
    assert record["metrics"]["samples_to_target/adamw/reached"] == 1
    assert f"| adamw/before/64 | {mean(values):,.0f}* | {stdev(values):,.0f} | 2 | 1 |" in part(markdown, "Final round")
    assert "1 of 3 runs of adamw/before/64 failed" in markdown
    assert "The last line of final.jsonl is cut off" in part(markdown, "In short")
    assert "| adamw/before/64 final seed 13 | failed | out of memory |" in markdown


def test_importance_is_of_the_setting_that_matters(tmp_path: Path) -> None:
    study = study_of(tmp_path, batches={64: {}}, variants={"before": {}}, trials=12)
    journal = Journal(tmp_path)
    for number in range(12):
        journal.add("adamw/before/64", "COMPLETE", outcome(10_000 + 1000 * number), lr=1e-4 * (number + 1))
    for number in range(7):
        journal.add("lamb/before/64", "COMPLETE", outcome(10_000 + 1000 * number), lr=1e-4 * (number + 1))
    importance = part(written(study, tmp_path)[1], "Importance of the settings")
    shares = re.findall(r"^\| adamw: (\S+) \| (\S+) \| \2 \|$", importance, re.MULTILINE)
    assert [name for name, _ in shares] == ["optimizer.lr", "optimizer.weight_decay"]
    assert float(shares[0][1]) > 0.6
    assert sum(float(share) for _, share in shares) == pytest.approx(1, abs=0.02)
    assert "lamb/before/64" in importance.split("Left out")[1]


def test_what_the_report_does_not_cover_is_named(tmp_path: Path) -> None:
    journal = Journal(tmp_path)
    for cell in ("adamw/before/64", "muon/before/64", "<i>soap/before/64"):
        journal.add(cell, "COMPLETE", outcome(20_000))
    study_of(tmp_path)
    study = read_study(tmp_path / "study.yaml", contestants=["adamw"])
    record, markdown, page = written(study, tmp_path)
    assert "trials/lamb" not in record["metrics"]
    assert "Left out of this report: lamb." in markdown
    assert "journal.log also has trials of <i>soap/before/64, muon/before/64" in page, "shown, not taken as markup"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{}\n{}\n", r"final.jsonl line 1 is of another form"),
        ("nonsense\n{}\n", r"final.jsonl line 1 is of another form .*remove the line"),
    ],
)
def test_damaged_final_round(tmp_path: Path, content: str, message: str) -> None:
    study = study_of(tmp_path)
    Journal(tmp_path).add("adamw/before/64", "COMPLETE", outcome(20_000))
    (tmp_path / "final.jsonl").write_text(content, encoding="utf-8")
    with pytest.raises(UserError, match=message):
        write_report(study, tmp_path)


def test_no_journal_and_no_optuna(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    study = study_of(tmp_path)
    with pytest.raises(UserError, match=r"journal.log does not exist"):
        write_report(study, tmp_path)
    assert not (tmp_path / "journal.log").exists()
    (tmp_path / "journal.log").write_text("nonsense\n\n", encoding="utf-8")
    with pytest.raises(UserError, match=r"cannot be read as the journal of a search"):
        write_report(study, tmp_path)
    monkeypatch.setitem(sys.modules, "optuna", None)
    with pytest.raises(UserError, match=r"pip install optuna"):
        write_report(study, tmp_path)


def test_the_journal_is_only_read(tmp_path: Path) -> None:
    study = study_of(tmp_path)
    Journal(tmp_path).add("adamw/before/64", "COMPLETE", outcome(20_000))
    before = (tmp_path / "journal.log").read_bytes()
    write_report(study, tmp_path)
    assert (tmp_path / "journal.log").read_bytes() == before
    assert {path.name for path in tmp_path.iterdir()} == {
        "study.yaml", "journal.log", "tune.json", "report.md", "report.html",
    }  # fmt: skip


def test_sign_flip_against_a_hand_computed_case() -> None:
    # Of 1, 2, 3 with signs the sums are 6, 4, 2, 0, 0, -2, -4, -6: two of eight are as far from 0 as 6, four as far as 4
    assert sign_flip_p([1.0, 2.0, 3.0]) == 2 / 8
    assert sign_flip_p([-1.0, 2.0, 3.0]) == 4 / 8
    assert sign_flip_p([0.0, 0.0]) == 1
    assert sign_flip_p([0.1] * 3 + [-0.1]) == pytest.approx(10 / 16)  # equal but for rounding


def test_sign_flip_against_a_loop() -> None:
    differences = [3.5, -1.25, 0.5, 7.0, -2.0, 4.25]
    sums = [sum(s * d for s, d in zip(signs, differences, strict=True)) for signs in product((1, -1), repeat=6)]
    assert sign_flip_p(differences) == sum(abs(each) >= abs(sum(differences)) for each in sums) / 64


def test_comparison_is_over_common_seeds() -> None:
    compared = compare({1: 10.0, 2: 20.0, 3: 99.0}, {1: 20.0, 2: 40.0, 4: 1.0})
    assert compared is not None
    assert (compared.n, compared.ratio, compared.p) == (2, 0.5, 0.5)
    assert compare({1: 1.0}, {2: 1.0}) is None
    single = compare({1: 1.0}, {1: 2.0})
    assert single is not None
    assert single.p is None


def test_many_seeds_have_a_t_test() -> None:
    with pytest.raises(ValueError, match="16"):
        sign_flip_p([1.0] * 17)
    assert paired_p([1.0, -1.0] * 10) == pytest.approx(1)
    assert paired_p([1.0, 1.1] * 10) < 1e-6
    assert paired_p([0.0] * 20) == 1
